"""Who takes part: all forms of the pair, other libraries' SGD, and FusedSGDR.

The pair is torch.optim.SGD with CosineAnnealingWarmRestarts, both stepped once a call. Another
library's SGD has the same scheduler. One that is missing, does not run here or makes another update
is left out, with the reason in the results.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from benchmarks import optax_process
from benchmarks.harness import Candidate, Clock, LocalCandidate
from benchmarks.workload import OPTIONS, SCHEDULE, Build, ParamGroups, Step, Workload, fused_sgdr

__all__ = ["IN_GRAPH", "NATIVE", "NATIVE_IN_GRAPH", "REFERENCE", "Lineup", "pair", "steps", "whole"]

NATIVE = "FusedSGDR"
REFERENCE = "FusedSGDR, reference"
NATIVE_IN_GRAPH = "FusedSGDR in a CUDA graph"
FUSED = "SGD(fused=True) + scheduler"
FOREACH = "SGD(foreach=True) + scheduler"
TENSOR_LR = "SGD(fused=True), tensor LR + scheduler"
COMPILED = "compiled SGD, tensor LR + scheduler"
IN_GRAPH = "SGD(fused=True) in a CUDA graph + scheduler"
WHOLE_IN_GRAPH = "clip, SGD(fused=True), EMA in a CUDA graph + scheduler"
OPTAX = "optax, jit, donated buffers"

EMA_DECAY = 0.999
# torch sums the squares in float32.
NORM_EPS = 16 * torch.finfo(torch.float32).eps
# More take minutes to compile.
MOST_TENSORS_TO_COMPILE = {"cpu": 100, "cuda": 500}


# ----------------------------------------------------------------------------------- ways to step


def with_scheduler(make: Callable[[ParamGroups], Optimizer]) -> Build:
    """Builds an SGD and torch's scheduler."""

    def build(groups: ParamGroups) -> tuple[Optimizer, Step]:
        sgd = make(groups)
        scheduler = CosineAnnealingWarmRestarts(sgd, **SCHEDULE)

        def step() -> None:
            sgd.step()
            scheduler.step()

        return sgd, step

    return build


def pair(tensor_lr: bool = False, **how: bool) -> Build:
    """Builds the pair; passes ``how`` to torch.optim.SGD."""
    return with_scheduler(lambda groups: _sgd(groups, tensor_lr, **how))


def _sgd(groups: ParamGroups, tensor_lr: bool, **how: bool) -> SGD:
    lr = OPTIONS["lr"]
    if tensor_lr:
        lr = torch.tensor(lr, device=groups[0]["params"][0].device)
    return SGD(groups, **OPTIONS | {"lr": lr}, **how)


def compiled_pair(groups: ParamGroups) -> tuple[Optimizer, Step]:
    """The compiled update, with the scheduler outside; a float LR would be a constant in it."""
    torch.compiler.reset()  # otherwise the last case's graphs count as recompilations
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # do not silently run eagerly
    sgd = _sgd(groups, tensor_lr=True, foreach=True)
    scheduler = CosineAnnealingWarmRestarts(sgd, **SCHEDULE)
    update = torch.compile(lambda: sgd.step())

    def step() -> None:
        update()
        scheduler.step()

    return sgd, step


def pair_in_graph(groups: ParamGroups) -> tuple[Optimizer, Step]:
    """The update in a graph, and outside it the scheduler, which writes the LR from the host."""
    sgd = _sgd(groups, tensor_lr=True, fused=True)
    scheduler = CosineAnnealingWarmRestarts(sgd, **SCHEDULE)
    sgd.step()  # otherwise the graph would create new momentum at each replay
    for state in sgd.state.values():
        state["momentum_buffer"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sgd.step()

    def step() -> None:
        graph.replay()
        scheduler.step()

    return sgd, step


def whole_pair_in_graph(max_grad_norm: float) -> Build:
    """Builds clip, update and average in a graph; in another the first step, which only copies."""

    def build(groups: ParamGroups) -> tuple[Optimizer, Step]:
        sgd = _sgd(groups, tensor_lr=True, fused=True)
        scheduler = CosineAnnealingWarmRestarts(sgd, **SCHEDULE)
        params = [param for group in groups for param in group["params"]]
        averages = [param.clone() for param in params]

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(params, max_grad_norm, foreach=True)
            sgd.step()

        update()
        for param, average in zip(params, averages, strict=True):
            sgd.state[param]["momentum_buffer"].zero_()
            sgd.state[param]["ema"] = average
        first, later = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            update()
            torch._foreach_copy_(averages, params)
        with torch.cuda.graph(later):
            update()
            torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)
        graphs = iter([first])

        def step() -> None:
            next(graphs, later).replay()
            scheduler.step()

        return sgd, step

    return build


def native_in_graph(groups: ParamGroups, **options: Any) -> tuple[Optimizer, Step]:
    """The whole FusedSGDR step in a graph, captured before the first step."""
    optimizer, step = fused_sgdr(groups, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return optimizer, graph.replay


def native(**options: Any) -> Build:
    """Builds FusedSGDR with more options."""
    return lambda groups: fused_sgdr(groups, **options)


def clip_step_average(max_grad_norm: float, update: Build) -> Build:
    """Builds torch's fastest functions for clipping and averaging around an update."""

    def build(groups: ParamGroups) -> tuple[Optimizer, Step]:
        sgd, update_step = update(groups)
        params = [param for group in groups for param in group["params"]]
        averages: list[Tensor] = []

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, max_grad_norm, foreach=True)
            update_step()
            if averages:
                torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)
            else:
                averages.extend(param.clone() for param in params)
                for param, average in zip(params, averages, strict=True):
                    sgd.state[param]["ema"] = average

        return sgd, step

    return build


# ------------------------------------------------------------------------------- other libraries


def c_compiler() -> str | None:
    """Path of the C compiler that torch.compile would use."""
    found = (shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang"))
    return next(filter(None, found), None)


def _pytorch_optimizer(library: Any, groups: ParamGroups) -> Optimizer:
    optimizer: Optimizer = library.SGDW(groups, **OPTIONS, weight_decouple=False, foreach=True)
    return optimizer


# Name: module, and how its optimizer is made.
LIBRARIES: dict[str, tuple[str, Callable[[Any, ParamGroups], Optimizer]]] = {
    "pytorch_optimizer SGDW": ("pytorch_optimizer", _pytorch_optimizer),
    "bitsandbytes SGD": ("bitsandbytes.optim", lambda lib, groups: lib.SGD(groups, **OPTIONS)),
    "apex FusedSGD": ("apex.optimizers", lambda lib, groups: lib.FusedSGD(groups, **OPTIONS)),
    "TransformerEngine FusedSGD": (
        "transformer_engine.pytorch.optimizers",
        lambda lib, groups: lib.FusedSGD(groups, **OPTIONS),
    ),
}


# ------------------------------------------------------------------------------------ the lineup


@dataclass
class Lineup:
    """The candidates of a case, each checked, and who is left out of it.

    Attributes:
        workload: What they work on.
        clock: Times them.
        candidates: The candidates.
        left_out: Others, and why.
    """

    workload: Workload
    clock: Clock
    candidates: list[Candidate] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Build, **check: Any) -> None:
        """Adds a candidate; an error if it does not make the reference's update."""
        step = self.workload.checked_step(name, build, **check)
        self.candidates.append(LocalCandidate(name, step, self.clock))

    def add_library(self, name: str, module: str, build: Callable[[Any], Build]) -> None:
        """Adds another library's SGD, or says why it is left out."""
        name += " + scheduler"
        try:
            library = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            # An installed library that does not load is named with its error.
            missing = getattr(error, "name", None) == module.partition(".")[0]
            self.left_out[name] = "not installed" if missing else f"does not load: {_first(error)}"
            return
        self.add_or_leave_out(name, build(library))

    def add_or_leave_out(self, name: str, build: Build, **check: Any) -> None:
        """Adds a candidate, or says why it is left out."""
        try:
            self.add(name, build, **check)
        except Exception as error:
            self.left_out[name] = (
                "makes another update"
                if isinstance(error, AssertionError)
                else f"does not run here: {_first(error)}"
            )

    @contextmanager
    def with_optax(self, threads: int, shapes: Any) -> Iterator[None]:
        """Adds optax, in a process of its own, which ends with the ``with`` block."""
        try:
            process = optax_process.start(OPTAX, self.clock.device, threads, shapes)
        except optax_process.LeftOut as reason:
            self.left_out[OPTAX] = str(reason)
            yield
            return
        with process:
            self.candidates.append(process)
            yield


def _first(error: Exception) -> str:
    """The first line of an error."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)[:200]


def steps(lineup: Lineup, n_tensors: int, options: Iterable[str] = ()) -> None:
    """Adds everyone who takes the plain step.

    Args:
        lineup: Who takes part.
        n_tensors: Number of tensors; a long list is not compiled.
        options: Further options of FusedSGDR to show the price of: keys of OPTIONS_OF_OURS.
    """
    device = lineup.clock.device
    lineup.add(NATIVE, native())
    if device == "cuda":
        lineup.add(NATIVE_IN_GRAPH, native_in_graph)
    for option in options:
        more, eps = _OF_OURS[option](lineup.workload)
        lineup.add(f"{NATIVE}, {option}", native(**more), momentum_eps=eps, **more)
    if device == "cpu":
        lineup.add(REFERENCE, native(backend="reference"))
        lineup.add("SGD(foreach=False) + scheduler", pair(foreach=False))
    lineup.add(FOREACH, pair(foreach=True))
    lineup.add(FUSED, pair(fused=True))
    lineup.add(TENSOR_LR, pair(fused=True, tensor_lr=True))
    if device == "cuda":
        lineup.add(IN_GRAPH, pair_in_graph)
    if n_tensors > MOST_TENSORS_TO_COMPILE[device]:
        lineup.left_out[COMPILED] = "compiling so many tensors takes minutes"
    elif not c_compiler():
        lineup.left_out[COMPILED] = "there is no C compiler"
    else:
        lineup.add(COMPILED, compiled_pair)
    for name, (module, make) in LIBRARIES.items():
        lineup.add_library(
            name, module, lambda lib, make=make: with_scheduler(lambda groups: make(lib, groups))
        )


def max_grad_norm(workload: Workload) -> float:
    """A limit that every step of the check reaches."""
    squares = sum(float(param.grad.double().square().sum()) for param in workload.params)
    return float(0.75 * squares**0.5)


# Options whose price is shown, and the relative error that the momentum buffer may have.
_OF_OURS: dict[str, Callable[[Workload], tuple[dict[str, Any], float]]] = {
    "max_grad_norm": lambda workload: ({"max_grad_norm": max_grad_norm(workload)}, NORM_EPS),
    "ema_decay": lambda workload: ({"ema_decay": EMA_DECAY}, 0.0),
    "momentum in bfloat16": lambda workload: ({"momentum_dtype": torch.bfloat16}, 0.0),
}
OPTIONS_OF_OURS = tuple(_OF_OURS)


def whole(lineup: Lineup) -> None:
    """Adds those that clip, step and average; torch sums the norm's squares in float32."""
    options = {"max_grad_norm": max_grad_norm(lineup.workload), "ema_decay": EMA_DECAY}

    def add(name: str, build: Build) -> None:
        lineup.add(name, build, momentum_eps=NORM_EPS, **options)

    add(NATIVE, native(**options))
    if lineup.clock.device == "cuda":
        add(NATIVE_IN_GRAPH, lambda groups: native_in_graph(groups, **options))
    for name, how in ((FOREACH, {"foreach": True}), (FUSED, {"fused": True})):
        add(f"clip, {name}, EMA", clip_step_average(options["max_grad_norm"], pair(**how)))
    if lineup.clock.device == "cuda":
        in_graph = whole_pair_in_graph(options["max_grad_norm"])
        lineup.add_or_leave_out(WHOLE_IN_GRAPH, in_graph, momentum_eps=NORM_EPS, **options)
