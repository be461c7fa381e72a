"""All benchmarks on a GPU: one step, whole trainings, and how a step scales.

    python -m benchmarks.gpu

Each candidate's step is timed until the GPU has finished it: cold, in single calls after which the
host waits, and hot, in bursts. Besides:

* host: time until the calls of a burst return;
* device: sum of its kernels' times, and their number, from the profiler, hot;
* of a copy: 20 bytes an element (read parameter, gradient and momentum, write parameter and
  momentum) divided by the device time, relative to the rate of a copy of as many bytes.

Without a GPU, --quick tries the benchmark on the CPU, and --draw FILE.json draws results measured
elsewhere, as FILE.png.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import scaling, steps, training
from benchmarks.contestants import c_compiler
from benchmarks.harness import Candidate, LocalCandidate, Settings, parse_settings
from benchmarks.report import gpu_properties, print_environment, save_picture, write_json
from benchmarks.workload import Step, Workload

BYTES_PER_ELEMENT = 20
PROFILED_STEPS = 5


# ---------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class KernelEvent:
    """One event on the device, from the profiler."""

    name: str
    microseconds: float

    @property
    def is_launch(self) -> bool:
        """Whether it is a kernel, not a copy or fill."""
        return not self.name.startswith(("Memcpy", "Memset"))


@dataclass(frozen=True)
class DeviceWork:
    """The device's part of one step.

    Attributes:
        launches: Number of kernels.
        microseconds: Sum of the times of kernels, copies and fills.
    """

    launches: float
    microseconds: float

    @classmethod
    def of(cls, events: Iterable[KernelEvent], steps: int) -> DeviceWork:
        """The mean over a number of steps."""
        seen = list(events)
        return cls(
            sum(event.is_launch for event in seen) / steps,
            sum(event.microseconds for event in seen) / steps,
        )


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_events(run: Step, device: str) -> list[KernelEvent]:
    """The events on the device during a call, from the profiler."""
    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    synchronize(device)
    # Without acc_events torch warns that it does not keep the events.
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        run()
        synchronize(device)
    return [
        KernelEvent(event.name, event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
    ]


def device_work(step: Step, device: str) -> DeviceWork:
    """Profiles PROFILED_STEPS steps."""
    if device != "cuda":
        return DeviceWork(0, 0)

    def steps() -> None:
        for _ in range(PROFILED_STEPS):
            step()

    return DeviceWork.of(device_events(steps, device), PROFILED_STEPS)


def copy_bytes_per_second(n_bytes: int, device: str) -> float:
    """Median rate of copies that read and write ``n_bytes`` together, in bytes a second."""
    source = torch.empty(max(1, n_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        if device == "cuda":
            work = device_work(lambda: target.copy_(source), device)
            seconds.append(work.microseconds * 1e-6)
        else:
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds)


def profile(candidate: Candidate, workload: Workload) -> dict[str, Any]:
    """What the profiler says of a candidate; nothing of one in another process, or on the CPU."""
    if not isinstance(candidate, LocalCandidate) or candidate.clock.device != "cuda":
        return {}
    work = device_work(candidate.step, "cuda")
    n_bytes = BYTES_PER_ELEMENT * sum(param.numel() for param in workload.params)
    rate = n_bytes / (work.microseconds * 1e-6)
    return {
        "device_us": round(work.microseconds, 3),
        "launches": work.launches,
        "bytes_per_second": rate,
        "of_a_copy": round(rate / copy_bytes_per_second(n_bytes, "cuda"), 4),
    }


def picture(results: dict[str, Any]) -> Any:
    """Draws a run's results, with the GPU's name."""
    figure = steps.draw(results["cases"])
    gpu = results["gpu"]
    where = gpu["name"] if gpu else "on the CPU, to try it out: no result"
    how = ", cold" if "cold" in results["cases"][0]["candidates"][0] else ""
    figure.suptitle(
        f"{where}. One step until it is done{how}; dark: the GPU's own time", fontsize=9
    )
    return figure


def measured(settings: Settings) -> Path:
    """Measures one step of all cases and writes gpu.json; returns its path."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not settings.quick:
        raise SystemExit("there is no GPU; --quick tries the benchmark out on the CPU")
    if not c_compiler():
        print("There is no C compiler, so torch.compile is left out.")
    print_environment()
    results: list[dict[str, Any]] = []
    for case in steps.cases(settings, device):
        results.append(steps.run_case(case, settings, device, profile))
        # Saved after each case, because the machine may be gone before the last.
        path = write_json(settings, "gpu", {"gpu": gpu_properties(), "cases": results})
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all and draws it, or draws an earlier run's steps."""
    settings = parse_settings(argv, __doc__, can_draw=True)
    path = settings.draw or measured(settings)
    if settings.draw is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        training.run(settings, device)
        scaling.run(settings, device)
    if importlib.util.find_spec("matplotlib") is None:
        # Another machine can draw the results.
        print(f"there is no matplotlib here; to draw elsewhere, run with --draw {path}")
        return
    save_picture(picture(json.loads(path.read_text())), path)


if __name__ == "__main__":
    main()
