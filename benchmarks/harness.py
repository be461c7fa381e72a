"""How the benchmarks time: hot and cold, all candidates in turn.

* Hot: a burst of calls, one after the other, with everything in the caches.
* Cold: single calls. Before each, outside the clock, a buffer larger than the last-level cache is
  written by as many threads as the step has; on a GPU also one larger than its L2 cache. So forward
  and backward pass leave the caches in a training. An empty call follows, as the interpreter and
  the clock are not what is measured.

Every round times every candidate, in shuffled order, so that noise affects all of them. A ratio is
taken within each round. The median over the rounds is reported, with a 95 % interval by bootstrap.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.workload import Step

__all__ = [
    "BUSY_LOAD",
    "Candidate",
    "Clock",
    "LocalCandidate",
    "Measured",
    "Seconds",
    "Settings",
    "Timing",
    "intra_op_threads",
    "last_level_cache_bytes",
    "measure",
    "parse_settings",
    "progress",
]

# Above this many cores used by other processes, parallel regions wait for their last thread.
BUSY_LOAD = 0.3
# A case that is out of time has at least this many rounds.
LEAST_ROUNDS = 7
COLD_CALLS_PER_ROUND = 2
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path(tempfile.gettempdir()) / "sgdr_fused_quick_benchmarks"
# So few that they do not fill a GPU's launch queue, for which the host would wait.
CALLS_PER_BURST_ON_GPU = 20


# ------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Settings:
    """The command line's settings.

    Attributes:
        rounds: Number of timings of each candidate, if there is time.
        case_seconds: After this time a case ends, with fewer rounds.
        burst_seconds: Least duration of a burst of hot calls.
        quick: Tiny shapes, to try the benchmark; the numbers mean nothing.
        out: Folder for JSON and pictures.
        load_before: Number of cores that other processes used just before.
        draw: Results of an earlier run to draw instead of measuring; None: measure.
    """

    rounds: int
    out: Path
    case_seconds: float = 25.0
    burst_seconds: float = 0.02
    quick: bool = False
    load_before: float = 0.0
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
    argv: Sequence[str] | None, description: str | None, can_draw: bool = False
) -> Settings:
    """Reads the command line.

    Args:
        argv: Arguments; None: those of the process.
        description: The benchmark's description; --help shows its first line.
        can_draw: Whether the benchmark can draw the results of an earlier run.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="timings of each candidate (default 30)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, 3 rounds: numbers that mean nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: benchmarks/results; with --quick a temporary one)",
    )
    if can_draw:
        parser.add_argument(
            "--draw", type=Path, metavar="JSON", help="draw an earlier run's results"
        )
    arguments = parser.parse_args(argv)
    draw = arguments.draw if can_draw else None
    rounds = arguments.rounds or (3 if arguments.quick else 30)
    if rounds < 2:
        parser.error("--rounds must be at least 2, for there to be a spread")
    load = 0.0 if draw or arguments.quick else cores_in_use()
    if load > BUSY_LOAD:
        print(f"Other processes use {load:.1f} cores: multi-threaded steps will look slow.")
    return Settings(
        rounds=rounds,
        out=arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS),
        burst_seconds=0.001 if arguments.quick else 0.02,
        quick=arguments.quick,
        load_before=round(load, 2),
        draw=draw,
    )


_STARTED = time.monotonic()


def progress(text: str) -> None:
    """Prints what begins now, and the minutes since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _STARTED), 60)
    print(f"[{minutes:2}:{seconds:02}] {text}", flush=True)


# ------------------------------------------------------------------------------------- the clock


class Seconds(NamedTuple):
    """The duration of calls.

    Attributes:
        returned: Until the calls returned.
        done: Until their work was done; on a GPU that is later.
    """

    returned: float
    done: float


def last_level_cache_bytes() -> int:
    """Size of the CPU's largest cache; 32 MiB where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=32 << 20)


class Clock:
    """Times calls, hot or cold.

    Args:
        device: Where the work is done: "cpu" or "cuda".
        wait: Waits for work that torch does not know of.

    Attributes:
        device: The device.
        evicted_bytes: Size of the buffers that are written before a cold call, by device.
    """

    def __init__(self, device: str = "cpu", wait: Callable[[], None] | None = None) -> None:
        self.device = device
        self._wait = wait
        self.evicted_bytes = {"cpu": max(64 << 20, 2 * last_level_cache_bytes())}
        if device == "cuda":
            l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            self.evicted_bytes["cuda"] = max(64 << 20, 2 * l2_bytes)
        self._buffers = [
            torch.zeros(size, dtype=torch.uint8, device=where)
            for where, size in self.evicted_bytes.items()
        ]

    def synchronize(self) -> None:
        """Waits for the device."""
        if self._wait is not None:
            self._wait()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def evict(self) -> None:
        """Replaces what is in the caches."""
        for buffer in self._buffers:
            buffer.add_(1)
        self.synchronize()

    def hot(self, step: Step, calls: int) -> Seconds:
        """The mean of consecutive calls."""
        with _no_garbage_collection():
            step()  # wakes the threads and fills the caches
            returned, done = self._time(step, calls)
        return Seconds(returned / calls, done / calls)

    def cold(self, step: Step) -> Seconds:
        """A single call."""
        with _no_garbage_collection():
            self.evict()
            self._time(_nothing, 1)  # otherwise the clock's own cold code is timed too
            return self._time(step, 1)

    def _time(self, step: Step, calls: int) -> Seconds:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        returned = time.perf_counter() - start
        if self.device == "cpu" and self._wait is None:
            return Seconds(returned, returned)
        self.synchronize()
        return Seconds(returned, time.perf_counter() - start)


def _nothing() -> None:
    pass


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect(0)
    gc.disable()
    try:
        yield
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


# ------------------------------------------------------------------------------------ candidates


class Candidate(Protocol):
    """One way to do the work; in this process or in another."""

    @property
    def name(self) -> str:
        """Unique among the candidates measured together."""

    def hot(self, calls: int) -> Seconds:
        """The mean of consecutive calls."""

    def cold(self) -> Seconds:
        """A single call, with cold caches."""


@dataclass(frozen=True)
class LocalCandidate:
    """A candidate in this process.

    Attributes:
        name: Unique among the candidates measured together.
        step: Does the work once.
        clock: Times it.
    """

    name: str
    step: Step
    clock: Clock

    def hot(self, calls: int) -> Seconds:
        """The mean of consecutive calls."""
        return self.clock.hot(self.step, calls)

    def cold(self) -> Seconds:
        """A single call, with cold caches."""
        return self.clock.cold(self.step)


# ---------------------------------------------------------------------------------------- timing


def median_interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """A 95 % interval of the median, by the percentile bootstrap; always the same one."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sample), (resamples, len(sample)), generator=generator)
    medians = sample[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class Timing:
    """The time of one call, in each round.

    Attributes:
        calls: Number of calls in one timing, of which it is the mean.
        seconds: Seconds a call, by round.
    """

    calls: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    def ratios_to(self, other: Timing) -> list[float]:
        """This time divided by the other's, in each round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def as_json(self, relative_to: Timing) -> dict[str, Any]:
        """Medians, with intervals: of the times in microseconds, and of the ratios."""
        ratios = self.ratios_to(relative_to)
        return {
            "median_us": round(self.median * 1e6, 3),
            "interval_us": [round(s * 1e6, 3) for s in median_interval(self.seconds)],
            "fastest_us": round(min(self.seconds) * 1e6, 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_interval": [round(ratio, 4) for ratio in median_interval(ratios)],
            "timings": len(self.seconds),
            "calls_per_timing": self.calls,
        }


@dataclass(frozen=True)
class Measured:
    """A candidate's timings.

    Attributes:
        cold: Of single calls, until done; empty if there were none.
        hot: Of bursts, until done.
        host: Of the same bursts, until the calls returned.
    """

    cold: Timing
    hot: Timing
    host: Timing

    def as_json(self, relative_to: Measured) -> dict[str, Any]:
        """All of them; the host's only if it does not wait for the work."""
        timings = {"hot": self.hot.as_json(relative_to.hot)}
        if self.cold.seconds:
            timings["cold"] = self.cold.as_json(relative_to.cold)
        if self.host.median < 0.99 * self.hot.median:
            timings["host"] = self.host.as_json(relative_to.host)
        return timings


def measure(
    candidates: Sequence[Candidate],
    settings: Settings,
    device: str = "cpu",
    cold_calls: int = COLD_CALLS_PER_ROUND,
) -> dict[str, Measured]:
    """Times all candidates in turn, hot and cold.

    Args:
        candidates: The candidates.
        settings: Number of rounds, and the time they may take.
        device: Where the work is done.
        cold_calls: Number of cold calls of each candidate in a round.

    Returns:
        The timings, by the candidates' names.
    """
    calls = {c.name: _calls(c, settings, device) for c in candidates}
    measured = {
        name: Measured(Timing(1), Timing(calls[name]), Timing(calls[name])) for name in calls
    }
    shuffle = random.Random(0).shuffle
    order = list(candidates)
    end = time.monotonic() + settings.case_seconds
    for i in range(settings.rounds):
        if i >= LEAST_ROUNDS and time.monotonic() > end:
            break
        shuffle(order)
        for candidate in order:
            returned, done = candidate.hot(calls[candidate.name])
            measured[candidate.name].host.seconds.append(returned)
            measured[candidate.name].hot.seconds.append(done)
        for _ in range(cold_calls):
            shuffle(order)
            for candidate in order:
                measured[candidate.name].cold.seconds.append(candidate.cold().done)
    return measured


def _calls(candidate: Candidate, settings: Settings, device: str) -> int:
    """So many calls that a burst takes long enough for the clock."""
    if device == "cuda":
        return 2 if settings.quick else CALLS_PER_BURST_ON_GPU
    calls = 1
    while (seconds := candidate.hot(calls).done * calls) < settings.burst_seconds:
        calls = max(calls + 1, int(calls * min(10.0, 1.1 * settings.burst_seconds / seconds)))
    return calls
