"""How a step's time grows: with the number of tensors of 64 elements, and with one tensor's size.

    python -m benchmarks.scaling

The pair and FusedSGDR with torch's number of threads, FusedSGDR with one thread, and the memory
floor: a bare loop of the same loads and stores; on a GPU, a copy of as many bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.contestants import FOREACH, FUSED, NATIVE, Lineup, native, pair
from benchmarks.harness import (
    Clock,
    LocalCandidate,
    Settings,
    intra_op_threads,
    measure,
    parse_settings,
    progress,
)
from benchmarks.memory_floor import FLOOR, floor_candidates
from benchmarks.report import (
    gpu_properties,
    new_axes,
    print_environment,
    print_table,
    save_picture,
    write_json,
)
from benchmarks.workload import Workload

__all__ = ["ONE_THREAD", "draw", "run"]

ONE_THREAD = f"{NATIVE}, 1 thread"
BY_COUNT, BY_SIZE = "tensors of 64 elements", "elements of one tensor"
POINT_SECONDS = 4.0


def sweeps(quick: bool) -> dict[str, list[int]]:
    """The numbers to measure, by what is counted."""
    return {
        BY_COUNT: [1, 10, 100] if quick else [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000],
        BY_SIZE: [1 << e for e in ((6, 12, 15) if quick else range(6, 27, 2))],
    }


def run_point(axis: str, size: int, settings: Settings, device: str) -> dict[str, Any]:
    """Measures one number of tensors or elements."""
    each = shapes.small_tensors(size) if axis == BY_COUNT else [(size,)]
    lineup = Lineup(Workload(each, device), Clock(device))
    lineup.add(NATIVE, native())
    lineup.add(FUSED, pair(fused=True))
    lineup.add(FOREACH, pair(foreach=True))
    measured = measure([*lineup.candidates, *_floors(lineup)], settings, device)
    entries = {name: timing.as_json(measured[NATIVE]) for name, timing in measured.items()}
    floors = [name for name in entries if name.startswith(FLOOR)]
    fastest = min(floors, key=lambda name: entries[name]["hot"]["median_us"])
    floor = entries[fastest]
    entries = {name: entry for name, entry in entries.items() if name not in floors}
    entries[FLOOR] = floor
    if device == "cpu":
        with intra_op_threads(1):
            alone = measure(lineup.candidates[:1], settings, device)[NATIVE]
        entries[ONE_THREAD] = alone.as_json(alone)
    return {
        "size": size,
        "elements": shapes.numel(each),
        "candidates": [{"name": name} | entry for name, entry in entries.items()],
    }


def _floors(lineup: Lineup) -> list[LocalCandidate]:
    if lineup.clock.device == "cpu":
        return floor_candidates(lineup.workload, lineup.clock)
    # Five floats an element are read or written; a copy reads one half and writes the other.
    n_elements = sum(param.numel() for param in lineup.workload.params)
    source = torch.zeros(-(-5 * n_elements // 2), device="cuda")
    target = torch.zeros_like(source)
    return [LocalCandidate(f"{FLOOR}, a copy", lambda: target.copy_(source), lineup.clock)]


def draw(series: Sequence[dict[str, Any]]) -> Any:
    """Draws time against size, both logarithmic: lines cold, dots hot."""
    figure, axes = new_axes(1, 2, height=4.6, width=11)
    colors = {
        NATIVE: "#1f4e79",
        ONE_THREAD: "#6fa8dc",
        FUSED: "#d9822b",
        FOREACH: "#e8b98a",
        FLOOR: "0.55",
    }
    for ax, one in zip(axes, series, strict=True):
        sizes = [point["size"] for point in one["points"]]
        for name, color in colors.items():
            entries = [
                entry
                for point in one["points"]
                for entry in point["candidates"]
                if entry["name"] == name
            ]
            if not entries:
                continue
            cold = [entry["cold"] for entry in entries]
            low, high = zip(*(timing["interval_us"] for timing in cold), strict=True)
            style = "--" if name == FLOOR else "-"
            medians = [timing["median_us"] for timing in cold]
            ax.plot(sizes, medians, style, color=color, label=name)
            ax.fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
            hot = [entry["hot"]["median_us"] for entry in entries]
            ax.plot(sizes, hot, ".", color=color, markersize=5)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel(one["axis"])
        ax.grid(color="0.9", linewidth=0.6)
    axes[0].set_ylabel("µs a step")
    axes[0].legend(frameon=False, fontsize=8, title="lines: cold, 95 %; dots: hot")
    return figure


def run(settings: Settings, device: str) -> None:
    """Measures all sizes; writes scaling.json and scaling.png, on a GPU gpu_scaling."""
    settings = dataclasses.replace(settings, case_seconds=POINT_SECONDS)
    series: list[dict[str, Any]] = []
    for axis, sizes in sweeps(settings.quick).items():
        series.append({"axis": axis, "points": []})
        for size in sizes:
            progress(f"{size} {axis}")
            series[-1]["points"].append(run_point(axis, size, settings, device))
        names = [entry["name"] for entry in series[-1]["points"][0]["candidates"]]
        rows = [
            [
                str(point["size"]),
                *(
                    f"{entry['cold']['median_us']:.1f} / {entry['hot']['median_us']:.1f}"
                    for entry in point["candidates"]
                ),
            ]
            for point in series[-1]["points"]
        ]
        print_table(f"µs a step, cold / hot, over the {axis}", [axis, *names], rows)
    name = "gpu_scaling" if device == "cuda" else "scaling"
    path = write_json(settings, name, {"gpu": gpu_properties(), "series": series})
    save_picture(draw(series), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures on the GPU if there is one, else on the CPU."""
    settings = parse_settings(argv, __doc__)
    print_environment()
    run(settings, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
