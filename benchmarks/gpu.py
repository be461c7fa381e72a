"""One optimizer step on a GPU: all forms of the pair against FusedSGDR.

    python -m benchmarks.gpu

The pair is torch.optim.SGD with CosineAnnealingWarmRestarts, both stepped once a call. Everything
is float32, with momentum 0.9, weight decay 1e-4 and Nesterov. For each candidate:

* host: time until the calls return;
* step: time until the GPU has finished them, back to back;
* device: sum of its kernels' times, and their number, from the profiler;
* of a copy: 20 bytes an element (read parameter, gradient and momentum, write parameter and
  momentum) divided by the device time, relative to the rate of a copy of as many bytes.

Without a GPU, --quick tries the benchmark on the CPU, and --draw FILE.json draws results measured
elsewhere, as FILE.png.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.profiler import ProfilerActivity

from benchmarks import shapes
from benchmarks.harness import (
    OPTIONS,
    SCHEDULE,
    Build,
    Candidate,
    Settings,
    Step,
    Timing,
    Workload,
    fused_sgdr,
    parse_settings,
)
from benchmarks.report import new_axes, print_table, save_picture, write_json
from benchmarks.step import pair

NATIVE = "FusedSGDR"
NATIVE_IN_GRAPH = "FusedSGDR in a CUDA graph"
BYTES_PER_ELEMENT = 20
PROFILED_STEPS = 5
# torch.compile takes minutes for more tensors.
MOST_TENSORS_TO_COMPILE = 500


# --------------------------------------------------------------------------------------- candidates


def _pair_with_tensor_lr(params: list[Tensor]) -> tuple[SGD, CosineAnnealingWarmRestarts]:
    lr = torch.tensor(OPTIONS["lr"], device=params[0].device)
    sgd = SGD(params, **OPTIONS | {"lr": lr}, fused=True)
    return sgd, CosineAnnealingWarmRestarts(sgd, **SCHEDULE)


def pair_with_tensor_lr(params: list[Tensor]) -> tuple[Optimizer, Step]:
    """The pair with its LR in a GPU tensor, which a CUDA graph needs."""
    sgd, scheduler = _pair_with_tensor_lr(params)

    def step() -> None:
        sgd.step()
        scheduler.step()

    return sgd, step


def pair_in_graph(params: list[Tensor]) -> tuple[Optimizer, Step]:
    """The update in a graph, and outside it the scheduler, which writes the LR from the host."""
    sgd, scheduler = _pair_with_tensor_lr(params)
    sgd.step()  # otherwise the graph would create new momentum at each replay
    for param in params:
        sgd.state[param]["momentum_buffer"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sgd.step()

    def step() -> None:
        graph.replay()
        scheduler.step()

    return sgd, step


def native_in_graph(params: list[Tensor]) -> tuple[Optimizer, Step]:
    """The whole FusedSGDR step in a graph, captured before the first step."""
    optimizer, step = fused_sgdr(params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return optimizer, graph.replay


def c_compiler() -> str | None:
    """Path of the C compiler that Triton would use; torch.compile needs one on a GPU."""
    found = (shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang"))
    return next(filter(None, found), None)


def apex_pair() -> Build | None:
    """The pair with apex's FusedSGD, if apex is installed."""
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        return None

    def build(params: list[Tensor]) -> tuple[Optimizer, Step]:
        sgd = FusedSGD(params, **OPTIONS)
        scheduler = CosineAnnealingWarmRestarts(sgd, **SCHEDULE)

        def step() -> None:
            sgd.step()
            scheduler.step()

        return sgd, step

    return build


def builds(device: str, n_tensors: int) -> dict[str, Build]:
    """The candidates for this number of tensors; on the CPU only those that run there."""
    found: dict[str, Build] = {
        NATIVE: fused_sgdr,
        "SGD(fused=True) + scheduler": pair(fused=True),
        "SGD(fused=True), tensor LR + scheduler": pair_with_tensor_lr,
        "SGD(foreach=True) + scheduler": pair(foreach=True),
    }
    if device == "cuda":
        found[NATIVE_IN_GRAPH] = native_in_graph
        found["SGD(fused=True) in a CUDA graph + scheduler"] = pair_in_graph
        if n_tensors <= MOST_TENSORS_TO_COMPILE and c_compiler():
            found["compiled SGD, tensor LR + scheduler"] = pair(compiled=True, foreach=True)
        apex = apex_pair()
        if apex is not None:
            found["apex FusedSGD + scheduler"] = apex
    return found


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


def measure(
    candidates: Sequence[Candidate], settings: Settings, device: str
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times all candidates, interleaved: until the calls return, and until the work is done."""
    # So few that they do not fill the launch queue, for which the host would wait.
    calls = 2 if settings.quick else 20
    host = {c.name: Timing(c.name, calls, []) for c in candidates}
    step = {c.name: Timing(c.name, calls, []) for c in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for _ in range(settings.rounds):
        shuffle(order)
        for candidate in order:
            returned, done = _time(candidate.step, calls, device)
            host[candidate.name].seconds.append(returned / calls)
            step[candidate.name].seconds.append(done / calls)
    return host, step


def _time(step: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    returned = time.perf_counter() - start
    synchronize(device)
    return returned, time.perf_counter() - start


# ------------------------------------------------------------------------------------------ results


def cases(settings: Settings) -> dict[str, shapes.Shapes]:
    """The tensor lists."""
    if settings.quick:
        return {"MLP": shapes.mlp(), "ResNet-50 of width 4": shapes.resnet50(4, n_classes=10)}
    return {
        "MLP, 6 tensors, 10 k parameters": shapes.mlp(),
        "ResNet-50, 161 tensors": shapes.resnet50(),
        "2000 tensors of 64 elements": shapes.small_tensors(2000),
        "16 tensors of 16 M elements": [(1 << 24,)] * 16,
    }


def run_case(title: str, case: shapes.Shapes, settings: Settings, device: str) -> dict[str, Any]:
    """Measures one case and prints its table."""
    workload = Workload(case, device)
    candidates = [
        workload.candidate(name, torch.get_num_threads(), build)
        for name, build in builds(device, len(case)).items()
    ]
    host, step = measure(candidates, settings, device)
    n_bytes = BYTES_PER_ELEMENT * shapes.numel(case)
    copy = copy_bytes_per_second(n_bytes, device)
    entries = []
    for candidate in candidates:
        work = device_work(candidate.step, device)
        rate = n_bytes / (work.microseconds * 1e-6) if work.microseconds else None
        entries.append(
            {
                "name": candidate.name,
                "host": host[candidate.name].as_json(),
                "step": step[candidate.name].as_json(),
                "ratio": round(step[candidate.name].ratio_to(step[NATIVE]), 4),
                "device_us": round(work.microseconds, 3),
                "launches": work.launches,
                "bytes_per_second": rate,
                "of_a_copy": None if rate is None else round(rate / copy, 4),
            }
        )
    print_table(
        title,
        ("", "host µs", "step µs", "/ FusedSGDR", "device µs", "launches", "of a copy"),
        [_cells(entry) for entry in entries],
    )
    return {
        "title": title,
        "tensors": len(case),
        "elements": shapes.numel(case),
        "copy_bytes_per_second": copy,
        "candidates": entries,
    }


def _cells(entry: dict[str, Any]) -> list[str]:
    share = entry["of_a_copy"]
    return [
        entry["name"],
        f"{entry['host']['median_us']:.1f}",
        f"{entry['step']['median_us']:.1f}",
        f"{entry['ratio']:.2f}",
        f"{entry['device_us']:.1f}",
        f"{entry['launches']:g}",
        "" if share is None else f"{share:.0%}",
    ]


def draw(results: Sequence[dict[str, Any]]) -> Any:
    """Draws a panel for each case: bars for the step, and within them the device's time."""
    figure, axes = new_axes(len(results), 1, height=2.2 * len(results))
    for ax, case in zip(axes, results, strict=True):
        names = [entry["name"] for entry in case["candidates"]]
        steps = [entry["step"]["median_us"] for entry in case["candidates"]]
        colors = ["#1f4e79" if name.startswith(NATIVE) else "#e8b98a" for name in names]
        bars = ax.barh(names, steps, color=colors, height=0.7)
        ax.barh(
            names, [e["device_us"] for e in case["candidates"]], color="0.2", height=0.15, zorder=3
        )
        labels = [_label(entry) for entry in case["candidates"]]
        ax.bar_label(bars, labels, fontsize=8, padding=2)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.75 * max(steps))
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(axis="y", length=0, labelsize=9)
        ax.set_title(case["title"], loc="left", fontsize=10, fontweight="bold")
    return figure


def _label(entry: dict[str, Any]) -> str:
    microseconds, launches = entry["step"]["median_us"], entry["launches"]
    time = f"{microseconds:.3g}" if microseconds < 1000 else f"{microseconds:,.0f}"
    plural = "" if launches == 1 else "es"
    return f" {time} µs ({entry['ratio']:.3g}×), {launches:g} launch{plural}"


def picture(results: dict[str, Any]) -> Any:
    """Draws a run's results, with the GPU's name."""
    figure = draw(results["cases"])
    gpu = results["gpu"]
    where = gpu["name"] if gpu else "on the CPU, to try it out: no result"
    figure.suptitle(f"{where}. One step until it is done; dark: the GPU's own time", fontsize=9)
    return figure


def measured(settings: Settings) -> Path:
    """Measures all cases and writes gpu.json; returns its path."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not settings.quick:
        raise SystemExit("there is no GPU; --quick tries the benchmark out on the CPU")
    if device == "cuda" and not c_compiler():
        print("There is no C compiler, so torch.compile is left out.")
    gpu = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    results: list[dict[str, Any]] = []
    for title, case in cases(settings).items():
        results.append(run_case(title, case, settings, device))
        # Saved after each case, because the machine may be gone before the last.
        path = write_json(settings, "gpu", {"gpu": gpu, "cases": results})
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases and draws them, or draws an earlier run."""
    settings = parse_settings(argv, __doc__, can_draw=True)
    path = settings.draw or measured(settings)
    if importlib.util.find_spec("matplotlib") is None:
        # Another machine can draw the results.
        print(f"there is no matplotlib here; to draw elsewhere, run with --draw {path}")
        return
    save_picture(picture(json.loads(path.read_text())), path)


if __name__ == "__main__":
    main()
