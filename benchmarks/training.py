"""Iterations a second of a whole training, with the pair and with FusedSGDR.

    python -m benchmarks.training

Synthetic data, one batch, in float32; on a GPU with autocast to bfloat16, eagerly and as one CUDA
graph that holds the whole iteration. The pair is SGD(fused=True) with its scheduler; in a graph its
LR is a tensor, which the scheduler writes between the replays. "whole" adds a GradScaler, clipping
and averaged weights; the pair does it with torch's fastest functions.

A training is timed only after its losses were compared with those of the pair, and the comparison
found a training without momentum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from benchmarks.contestants import EMA_DECAY
from benchmarks.harness import Clock, LocalCandidate, Settings, measure, parse_settings, progress
from benchmarks.models import ON_CPU, ON_GPU, TASKS
from benchmarks.report import gpu_properties, print_environment, print_table, write_json
from sgdr_fused import FusedSGDR

__all__ = ["Training", "Way", "checked", "losses", "run"]

OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
SCHEDULE: dict[str, Any] = {"T_0": 3, "T_mult": 2, "eta_min": 1e-4}
MAX_GRAD_NORM = 1.0
CHECKED_ITERATIONS = 8
CASE_SECONDS = 12.0
PAIR, OURS = "pair", "FusedSGDR"


@dataclass(frozen=True)
class Way:
    """How to train.

    Attributes:
        who: PAIR or OURS.
        whole: Whether with a GradScaler, clipping and averages.
        in_graph: Whether the iteration is a CUDA graph.
    """

    who: str
    whole: bool = False
    in_graph: bool = False

    @property
    def name(self) -> str:
        """Its row in the table."""
        whole = ", whole" if self.whole else ""
        return self.who + whole + (" in a CUDA graph" if self.in_graph else "")


class Training:
    """A model, a batch and an optimizer; a call is one iteration.

    Args:
        model: A key of TASKS.
        way: How to train.
        device: "cpu" or "cuda".
        **options: Other options of SGD than OPTIONS and the task's LR.
    """

    def __init__(self, model: str, way: Way, device: str, **options: Any) -> None:
        torch.manual_seed(0)
        task = TASKS[model]
        self.model = task.make().to(device)
        self.inputs = torch.randn(task.batch, *task.shape).to(device)
        self.targets = torch.randint(task.n_classes, (task.batch,)).to(device)
        self.device, self.way = device, way
        self.params = list(self.model.parameters())
        self.scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=way.whole)
        self.averages: list[Tensor] = []
        self.after: Callable[[], object] = lambda: None
        options = OPTIONS | {"lr": task.lr} | options
        self.optimizer = self._pair(options) if way.who == PAIR else self._ours(options)
        self.loss = self._forward().detach()
        self.iteration: Callable[[], object] = self._capture() if way.in_graph else self._iterate

    def __call__(self) -> None:
        """One iteration, and what is outside of the graph."""
        self.iteration()
        self.after()

    def _pair(self, options: dict[str, Any]) -> Optimizer:
        if self.way.in_graph:
            options["lr"] = torch.tensor(options["lr"], device=self.device)
        sgd = SGD(self.params, **options, fused=True)
        self.after = CosineAnnealingWarmRestarts(sgd, **SCHEDULE).step
        if self.way.whole:
            self.averages = [param.detach().clone() for param in self.params]
        return sgd

    def _ours(self, options: dict[str, Any]) -> Optimizer:
        whole = {"max_grad_norm": MAX_GRAD_NORM, "ema_decay": EMA_DECAY} if self.way.whole else {}
        return FusedSGDR(self.params, **options, **SCHEDULE, **whole)

    def _forward(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return nn.functional.cross_entropy(self.model(self.inputs), self.targets)

    def _iterate(self) -> None:
        self.optimizer.zero_grad()
        loss = self._forward()
        self.loss.copy_(loss.detach())
        self.scaler.scale(loss).backward()
        if self.averages:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averages:
            torch._foreach_lerp_(self.averages, self.params, 1 - EMA_DECAY)

    def _capture(self) -> Callable[[], object]:
        """Captures an iteration after two eager ones, and puts everything back to the start."""
        state = [*self.model.parameters(), *self.model.buffers(), *self.averages]
        start = [tensor.detach().clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._iterate()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self._iterate()
        with torch.no_grad():
            for tensor, value in zip(state, start, strict=True):
                tensor.copy_(value)
            for of_param in self.optimizer.state.values():
                of_param["momentum_buffer"].zero_()
        if isinstance(self.optimizer, FusedSGDR):
            self.optimizer.seek(0)
        return graph.replay


def losses(training: Training) -> Tensor:
    """The losses of the first iterations."""
    seen = []
    for _ in range(CHECKED_ITERATIONS):
        training()
        seen.append(training.loss.clone())
    return torch.stack(seen).double().cpu()


def checked(model: str, way: Way, device: str, expected: Tensor, **options: Any) -> Training:
    """A training whose losses were compared with those of the pair.

    Args:
        model: A key of TASKS.
        way: How to train.
        device: "cpu" or "cuda".
        expected: The pair's losses.
        **options: Other options of SGD than OPTIONS and the task's LR.

    Raises:
        AssertionError: Its losses differ.
    """
    training = Training(model, way, device, **options)
    worst = (losses(training) / expected - 1).abs().max().item()
    assert worst < _tolerance(device), f"{way.name} trains {model} to losses {worst:.1%} off"
    return training


def _tolerance(device: str) -> float:
    # On a GPU forward and backward pass round to bfloat16, in an order that may change.
    return 3e-2 if device == "cuda" else 1e-3


def run_model(model: str, settings: Settings, device: str) -> dict[str, Any]:
    """Measures one model, with all ways to train it."""
    progress(f"training: {model}")
    clock = Clock(device)
    candidates, left_out = [], {}
    for whole in (False, True):
        expected = losses(Training(model, Way(PAIR, whole), device))
        without = losses(Training(model, Way(PAIR, whole), device, momentum=0.0, nesterov=False))
        change = (without / expected - 1).abs().max().item()
        assert change > 2 * _tolerance(device), f"{model}: momentum changes the losses {change:.1%}"
        for in_graph in (False, True)[: 1 + (device == "cuda")]:
            for who in (PAIR, OURS):
                way = Way(who, whole, in_graph)
                try:
                    training = checked(model, way, device, expected)
                except RuntimeError as error:
                    if who == OURS:
                        raise
                    left_out[way.name] = str(error).partition("\n")[0]
                    continue
                candidates.append(LocalCandidate(way.name, training, clock))
    measured = measure(candidates, settings, device, cold_calls=0)
    entries = []
    for candidate in candidates:
        whole_of_it = ", whole" if ", whole" in candidate.name else ""
        baseline = measured[PAIR + whole_of_it]
        timings = measured[candidate.name].as_json(baseline)
        per_second = 1 / measured[candidate.name].hot.median
        entry = {"name": candidate.name, "iterations_per_second": round(per_second, 2)}
        entries.append(entry | timings)
    rows = [
        [
            entry["name"],
            f"{entry['iterations_per_second']:.1f}",
            f"{entry['hot']['median_us'] / 1000:.3f}",
            f"{1 / entry['hot']['ratio']:.3f}",
        ]
        for entry in entries
    ]
    print_table(model, ["", "iterations / s", "ms", "times the eager pair"], rows)
    for name, reason in left_out.items():
        print(f"  left out: {name}: {reason}")
    return {"title": model, "candidates": entries, "left_out": left_out}


def run(settings: Settings, device: str) -> None:
    """Measures all models; writes training.json, on a GPU gpu_training.json."""
    settings = dataclasses.replace(settings, case_seconds=CASE_SECONDS)
    models = ON_GPU if device == "cuda" else ON_CPU
    results: list[dict[str, Any]] = []
    for model in models[: 1 if settings.quick else None]:
        results.append(run_model(model, settings, device))
        name = "gpu_training" if device == "cuda" else "training"
        write_json(settings, name, {"gpu": gpu_properties(), "models": results})


def main(argv: Sequence[str] | None = None) -> None:
    """Measures on the GPU if there is one, else on the CPU."""
    settings = parse_settings(argv, __doc__)
    print_environment()
    run(settings, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
