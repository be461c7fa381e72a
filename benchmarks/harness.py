"""Shared by the benchmarks: equal work and interleaved timing. report.py shows the results.

* All candidates of a case update the same parameters with the same gradients. Each keeps the
  momentum buffers that it allocated at its first step.
* A candidate is timed only after its update was checked against the reference's.
* Every round times every candidate, in shuffled order, so that noise affects all of them. A ratio
  is taken within each round; the median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.shapes import Shapes
from sgdr_fused import FusedSGDR

__all__ = [
    "BUSY_LOAD",
    "OPTIONS",
    "SCHEDULE",
    "Build",
    "Candidate",
    "Settings",
    "Step",
    "Timing",
    "Workload",
    "fused_sgdr",
    "measure",
    "parse_settings",
]

# An LR so large that after a few steps every option's effect is above the rounding, also weight
# decay's.
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
# A first cycle so short that CHECKED_STEPS reach a restart.
SCHEDULE = {"T_0": 3, "T_mult": 2, "eta_min": 1e-3}
CHECKED_STEPS = 4
# For each option, the settings of a candidate that lacks it.
WITHOUT: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0, "nesterov": False},
    "Nesterov": {"nesterov": False},
    "weight decay": {"weight_decay": 0},
    "the schedule": {"eta_min": OPTIONS["lr"]},
    "the restart": {"n_cycles": 1},
}
# Above this many cores used by other processes, parallel regions wait for their last thread.
BUSY_LOAD = 0.3

Step = Callable[[], object]
Build = Callable[[list[Tensor]], tuple[Optimizer, Step]]


@dataclass(frozen=True)
class Settings:
    """The command line's settings.

    Attributes:
        rounds: Number of timings of each candidate.
        burst_seconds: Least duration of one timing.
        quick: Tiny shapes, to try the benchmark; the numbers mean nothing.
        out: Folder for JSON and pictures.
        load_before: Number of cores that other processes used just before.
        flags: Whether each of the benchmark's own flags was given.
        draw: Results of an earlier run to draw instead of measuring; None: measure.
    """

    rounds: int
    burst_seconds: float
    quick: bool
    out: Path
    load_before: float
    flags: dict[str, bool]
    draw: Path | None = None


def cores_in_use(seconds: float = 1.0) -> float:
    """Number of cores that other processes use now; a load average covers the last minutes.

    Args:
        seconds: How long to watch, while this process sleeps.

    Returns:
        Number of cores; 0 on a system without /proc/stat.
    """
    if not Path("/proc/stat").exists():
        return 0.0

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, iowait, *_ = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
        return user + nice + system, user + nice + system + idle + iowait

    busy_before, all_before = ticks()
    time.sleep(seconds)
    busy, total = ticks()
    return (os.cpu_count() or 1) * (busy - busy_before) / max(1, total - all_before)


def parse_settings(
    argv: Sequence[str] | None, description: str | None, can_draw: bool = False, **flags: str
) -> Settings:
    """Reads the command line.

    Args:
        argv: Arguments; None: those of the process.
        description: The benchmark's description; --help shows its first line.
        can_draw: Whether the benchmark can draw the results of an earlier run.
        **flags: The benchmark's own flags and their help.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="timings of each candidate (default 30)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 3 rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    if can_draw:
        parser.add_argument(
            "--draw", type=Path, metavar="JSON", help="draw an earlier run's results"
        )
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    arguments = parser.parse_args(argv)
    draw = arguments.draw if can_draw else None
    rounds = arguments.rounds or (3 if arguments.quick else 30)
    if rounds < 2:
        parser.error("--rounds must be at least 2, for there to be a spread")
    load = 0.0 if draw else cores_in_use()
    if load > BUSY_LOAD:
        print(f"Other processes use {load:.1f} cores: multi-threaded steps will look slow.")
    return Settings(
        rounds=rounds,
        burst_seconds=0.001 if arguments.quick else 0.02,
        quick=arguments.quick,
        out=arguments.out,
        load_before=round(load, 2),
        flags={flag: getattr(arguments, flag) for flag in flags},
        draw=draw,
    )


# ------------------------------------------------------------------------------------------ work


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Attributes:
        name: Unique among the candidates measured together.
        step: Does the work once.
        threads: Number of intra-op threads.
    """

    name: str
    step: Step
    threads: int


@dataclass(frozen=True)
class Expected:
    """The reference's result for a workload.

    Attributes:
        tensors: The parameters after CHECKED_STEPS, then their averages if there are any.
        changes: The least change of a parameter when an option of WITHOUT is missing.
    """

    tensors: list[Tensor]
    changes: dict[str, float]


class Workload:
    """Parameters with fixed gradients, which all candidates of a case share.

    They are allocated by kind: all parameters, all gradients, then all buffers.

    Args:
        shapes: The parameters' shapes.
        device: Their device.
        by_backward: Whether backward() makes the gradients, which leaves gaps between them where
            its intermediate results were. Otherwise they are adjacent, as in DDP's buckets.
        **options: FusedSGDR's options, besides those of all benchmarks.

    Attributes:
        params: The parameters, with gradients.
        momentum_buffers: Buffers for a step without an optimizer, as the memory floor's.
    """

    def __init__(
        self, shapes: Shapes, device: str = "cpu", by_backward: bool = False, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        self._grads = []
        for shape in shapes:
            # Magnitude from 0.5 to 1.5 with either sign, so that every element changes visibly.
            uniform = torch.rand(shape, generator=generator) - 0.5
            self._grads.append((uniform + torch.ones_like(uniform).copysign(uniform)).to(device))
        self._set_gradients(by_backward)
        self.momentum_buffers = [torch.zeros_like(param) for param in self.params]
        self._start = [param.clone() for param in self.params]
        self._options = options
        self._expected: dict[str, Expected] = {}

    def candidate(
        self,
        name: str,
        threads: int,
        build: Build,
        *,
        momentum_eps: float = 0.0,
        **options: Any,
    ) -> Candidate:
        """A candidate whose update was checked against the reference's.

        Args:
            name: Its name.
            threads: Number of intra-op threads for the check and the timing.
            build: Makes an optimizer for the parameters, and the function that takes one step.
            momentum_eps: Relative error of its momentum buffer after each step.
            **options: FusedSGDR's options for the reference, besides the workload's.

        Raises:
            AssertionError: Its parameters or averages differ from the reference's after a few
                steps, or the tolerance is so large that a missing option would not be found.
        """
        # Each step rounds the parameter, of magnitude 1, a few times.
        tolerance = 2 * CHECKED_STEPS * torch.finfo(torch.float32).eps
        # A gradient is at most 1.5, and the buffer at most 1.5 times the number of steps.
        tolerance += OPTIONS["lr"] * 1.5 * CHECKED_STEPS**2 * momentum_eps
        expected = self._expected_with(options)
        for missing, change in expected.changes.items():
            assert tolerance < change, (
                f"{name}: a tolerance of {tolerance:.2g} would hide that {missing} is missing, "
                f"which changes the result by {change:.2g}"
            )

        optimizer, step = build(self.params)
        with intra_op_threads(threads):
            result = self._after_steps(optimizer, step)
        try:
            torch.testing.assert_close(result, expected.tensors, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name} does not make the reference's update: {error}") from error
        if isinstance(optimizer, FusedSGDR) and optimizer.max_grad_norm is None:
            # A limit that is never reached leaves no trace in the parameters.
            assert (self._options | options).get("max_grad_norm") is None, f"{name} takes no norm"
        return Candidate(name, step, threads)

    def _expected_with(self, options: dict[str, Any]) -> Expected:
        key = str(sorted(options.items()))
        if key not in self._expected:
            tensors = self._after_reference_steps(options)
            changes = {
                missing: self._least_change(tensors, self._after_reference_steps(options | instead))
                for missing, instead in WITHOUT.items()
            }
            for param, start in zip(tensors, self._start, strict=False):
                assert (param - start).abs().min() > OPTIONS["lr"] / 4
            self._expected[key] = Expected(tensors, changes)
        return self._expected[key]

    def _least_change(self, expected: list[Tensor], others: list[Tensor]) -> float:
        """The minimum over the parameters of the largest change within one.

        A change is relative to 1 + abs(element), as the tolerance is.
        """
        n_params = len(self.params)
        pairs = zip(expected[:n_params], others[:n_params], strict=True)
        return min(float(((e - o).abs() / (1 + e.abs())).max()) for e, o in pairs)

    def _after_reference_steps(self, options: dict[str, Any]) -> list[Tensor]:
        of_all = self._options | options
        return self._after_steps(*fused_sgdr(self.params, backend="reference", **of_all))

    def _set_gradients(self, by_backward: bool) -> None:
        if not by_backward:
            # Copies, without the gaps that intermediate results left.
            for param, grad in zip(self.params, self._grads, strict=True):
                param.grad = grad.clone()
            return
        products = [
            (param.requires_grad_() * grad).sum()
            for param, grad in zip(self.params, self._grads, strict=True)
        ]
        torch.stack(products).sum().backward()
        for param in self.params:
            param.requires_grad_(False)

    def _after_steps(self, optimizer: Optimizer, step: Step) -> list[Tensor]:
        for param, start, grad in zip(self.params, self._start, self._grads, strict=True):
            param.copy_(start)
            param.grad.copy_(grad)
        for _ in range(CHECKED_STEPS):
            step()
        averages = [optimizer.state[p]["ema"] for p in self.params if "ema" in optimizer.state[p]]
        return [tensor.clone() for tensor in (*self.params, *averages)]


def fused_sgdr(
    params: list[Tensor], backend: str = "native", **options: Any
) -> tuple[Optimizer, Step]:
    """FusedSGDR with the benchmarks' options and further ones, and its step."""
    optimizer = FusedSGDR(params, **OPTIONS | SCHEDULE | options, backend=backend)
    return optimizer, optimizer.step


# ---------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """The time of one call, in each round.

    Attributes:
        name: The candidate's name.
        calls: Number of calls in one timing, of which it is the mean.
        seconds: Seconds a call, by round.
    """

    name: str
    calls: int
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """First and third quartile over the rounds, in seconds."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of this time divided by the other's in the same round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def as_json(self) -> dict[str, Any]:
        """Median, quartiles and fastest round, in microseconds."""
        return {
            "name": self.name,
            "median_us": round(self.median * 1e6, 3),
            "quartiles_us": [round(seconds * 1e6, 3) for seconds in self.quartiles()],
            "fastest_us": round(min(self.seconds) * 1e6, 3),
            "calls_per_round": self.calls,
        }


def measure(candidates: Sequence[Candidate], settings: Settings) -> dict[str, Timing]:
    """Times all candidates, interleaved.

    Args:
        candidates: The candidates.
        settings: Number of rounds and least duration of one timing.

    Returns:
        The timings, by the candidates' names.
    """
    calls = {c.name: _calls_in(settings.burst_seconds, c) for c in candidates}
    timings: dict[str, Timing] = {c.name: Timing(c.name, calls[c.name], []) for c in candidates}
    shuffle = random.Random(0).shuffle
    order = list(candidates)
    for _ in range(settings.rounds):
        shuffle(order)
        for candidate in order:
            seconds = _time(candidate, calls[candidate.name])
            timings[candidate.name].seconds.append(seconds / calls[candidate.name])
    return timings


def _calls_in(seconds: float, candidate: Candidate) -> int:
    calls = 1
    while (duration := _time(candidate, calls)) < seconds:
        calls = max(calls + 1, int(calls * min(10.0, 1.1 * seconds / duration)))
    return calls


def _time(candidate: Candidate, calls: int) -> float:
    step = candidate.step
    gc.collect(0)
    gc.disable()
    try:
        with intra_op_threads(candidate.threads):
            step()  # wakes the threads and fills the caches
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return time.perf_counter() - start
    finally:
        gc.enable()


@contextmanager
def intra_op_threads(threads: int) -> Iterator[None]:
    """Sets torch's number of intra-op threads within a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
