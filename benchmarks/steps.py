"""One optimizer step on the CPU: the pair in all forms, other libraries' SGD, and FusedSGDR.

    python -m benchmarks.steps

Everything is float32, with momentum 0.9, weight decay 1e-4 and Nesterov. Each candidate is timed
with cold caches, as a training leaves them, and with hot ones. All use the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import contestants, shapes
from benchmarks.contestants import NATIVE, REFERENCE, Lineup
from benchmarks.harness import (
    Candidate,
    Clock,
    Settings,
    intra_op_threads,
    measure,
    parse_settings,
    progress,
)
from benchmarks.memory_floor import FLOOR, floor_candidates
from benchmarks.report import (
    duration,
    new_axes,
    print_environment,
    print_table,
    save_picture,
    write_json,
)
from benchmarks.workload import Workload

__all__ = ["Case", "cases", "draw", "run_case"]

# What a profiler adds to a candidate's entry.
Profile = Callable[[Candidate, Workload], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A list of tensors to update.

    Attributes:
        title: Title of the table.
        shapes: Shapes of the parameters.
        n_groups: Number of param groups.
        threads: Number of intra-op threads; None: torch's default.
        whole: Whether to clip and average too.
        options: Further options of FusedSGDR to show the price of.
        has_floor: Whether to measure the memory floor too; on the CPU only.
    """

    title: str
    shapes: shapes.Shapes
    n_groups: int = 1
    threads: int | None = None
    whole: bool = False
    options: tuple[str, ...] = ()
    has_floor: bool = False


def cases(settings: Settings, device: str) -> list[Case]:
    """The cases to measure, the most important first."""
    small, ours = shapes.small_tensors, contestants.OPTIONS_OF_OURS
    mlp = Case("MLP, 6 tensors, 10 k parameters", shapes.mlp())
    if settings.quick:
        resnet = shapes.resnet50(width=4, n_classes=10)
        return [
            mlp,
            Case("20 tensors of 64 elements in 5 groups", small(20), n_groups=5, threads=1),
            Case("ResNet-50 of width 4", resnet, options=ours, has_floor=True),
            Case("clip + step + EMA: 20 tensors of 64 elements", small(20), whole=True),
        ]
    n_small = 1000 if device == "cpu" else 2000
    of_size, resnet50 = "tensors of 64 elements", shapes.resnet50()
    few = [
        mlp,
        Case("ResNet-50, 161 tensors", resnet50, options=ours, has_floor=True),
        Case(f"{n_small} {of_size}", small(n_small), options=ours[:2]),
        Case("clip + step + EMA: ResNet-50, 161 tensors", resnet50, whole=True),
        Case(f"clip + step + EMA: 1000 {of_size}", small(1000), whole=True),
        Case("465 groups, each 2 tensors of 64 elements", small(930), n_groups=465),
    ]
    on_device = {
        "cpu": [
            Case(f"1000 {of_size}, 1 thread", small(1000), threads=1),
            Case("one tensor of 32 M elements", [(1 << 25,)], has_floor=True),
        ],
        "cuda": [
            Case("16 tensors of 16 M elements", [(1 << 24,)] * 16),
            Case("one tensor of 256 M elements", [(1 << 28,)]),
            Case("clip + step + EMA: 8 tensors of 16 M elements", [(1 << 24,)] * 8, whole=True),
        ],
    }[device]
    return [
        *few,
        *on_device,
        Case("ResNet-18, 62 tensors", shapes.resnet18()),
        Case("ViT-B/16, 152 tensors", shapes.vit()),
        Case("ConvNeXt-T, 182 tensors", shapes.convnext_tiny()),
        Case("GPT-2 small, 148 tensors", shapes.gpt2()),
        Case(f"10,000 {of_size}", small(10_000)),
    ]


def run_case(
    case: Case, settings: Settings, device: str = "cpu", profile: Profile | None = None
) -> dict[str, Any]:
    """Measures one case and prints its table.

    Args:
        case: The case.
        settings: The command line's settings.
        device: Where the parameters are.
        profile: Adds to each candidate's entry, once it is timed.
    """
    progress(case.title)
    threads = case.threads or torch.get_num_threads()
    with intra_op_threads(threads), ExitStack() as stack:
        lineup = Lineup(Workload(case.shapes, device, case.n_groups), Clock(device))
        if case.whole:
            contestants.whole(lineup)
        else:
            contestants.steps(lineup, len(case.shapes), case.options)
            stack.enter_context(lineup.with_optax(threads, case.shapes))
        candidates = list(lineup.candidates)
        if case.has_floor and device == "cpu":
            candidates += floor_candidates(lineup.workload, lineup.clock)
        measured = measure(candidates, settings, device)
        entries = []
        for candidate in candidates:
            timings = measured[candidate.name].as_json(measured[NATIVE])
            more = profile(candidate, lineup.workload) if profile else {}
            entries.append({"name": candidate.name} | timings | more)
    entries = _fastest_floor_only(entries)
    _print(case.title, threads, entries, lineup.left_out)
    return {
        "title": case.title,
        "tensors": len(case.shapes),
        "elements": shapes.numel(case.shapes),
        "groups": case.n_groups,
        "threads": threads,
        "candidates": entries,
        "left_out": lineup.left_out,
    }


def _fastest_floor_only(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    floors = [entry for entry in entries if entry["name"].startswith(FLOOR)]
    slower = sorted(floors, key=lambda entry: entry["cold"]["median_us"])[1:]
    return [entry for entry in entries if entry not in slower]


def _print(
    title: str, threads: int, entries: Sequence[dict[str, Any]], left_out: dict[str, str]
) -> None:
    on_gpu = any("device_us" in entry for entry in entries)
    header = ["", "cold µs", "95 %", f"/ {NATIVE}", "hot µs", "95 %", f"/ {NATIVE}"]
    rows = []
    for entry in entries:
        row = [entry["name"]]
        for timing in (entry["cold"], entry["hot"]):
            low, high = (f"{us:.1f}" for us in timing["interval_us"])
            row += [f"{timing['median_us']:.1f}", f"{low} .. {high}", f"{timing['ratio']:.2f}"]
        if on_gpu:
            device_us, launches = entry.get("device_us"), entry.get("launches")
            host = entry.get("host", entry["hot"])["median_us"]
            row.append(f"{host:.1f}")
            row += ["", ""] if device_us is None else [f"{device_us:.1f}", f"{launches:g}"]
        rows.append(row)
    if on_gpu:
        header += ["host µs", "device µs", "launches"]
    print_table(f"{title} (threads: {threads})", header, rows)
    for name, reason in left_out.items():
        print(f"  left out: {name}: {reason}")


# ------------------------------------------------------------------------------------- the picture


def draw(results: Sequence[dict[str, Any]]) -> Any:
    """Draws a panel for each case: bars for cold steps, and within them lines for hot ones.

    Older results of a GPU have no cold steps: their bars are hot steps.
    """
    n_bars = max(len(case["candidates"]) for case in results)
    n_rows = (len(results) + 1) // 2
    figure, axes = new_axes(n_rows, 2, height=(0.6 + 0.17 * n_bars) * n_rows, width=12)
    for ax in axes[len(results) :]:
        ax.set_axis_off()
    for ax, case in zip(axes, results, strict=False):
        entries = case["candidates"]
        names = [entry["name"].partition(", chunks")[0] for entry in entries]
        shown = [entry.get("cold") or entry["step"] for entry in entries]
        medians = [timing["median_us"] for timing in shown]
        bars = ax.barh(names, medians, color=[_color(name) for name in names], height=0.7)
        inner = [entry.get("hot", entry.get("step"))["median_us"] for entry in entries]
        inner = [entry.get("device_us", hot) for entry, hot in zip(entries, inner, strict=True)]
        ax.barh(names, inner, color="0.2", height=0.15, zorder=3)
        labels = [
            f" {duration(timing['median_us'])} ({timing.get('ratio', entry.get('ratio')):.3g}×)"
            for entry, timing in zip(entries, shown, strict=True)
        ]
        ax.bar_label(bars, labels, fontsize=7, padding=2)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.4 * max(medians))
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(axis="y", length=0, labelsize=7)
        ax.set_title(case["title"], loc="left", fontsize=9, fontweight="bold")
    return figure


def _color(name: str) -> str:
    if name.startswith(FLOOR):
        return "#b8c4ce"
    return "#1f4e79" if name.startswith(NATIVE) and name != REFERENCE else "#e8b98a"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases; writes cpu.json and cpu.png."""
    settings = parse_settings(argv, __doc__)
    print_environment()
    results: list[dict[str, Any]] = []
    for case in cases(settings, "cpu"):
        results.append(run_case(case, settings))
        path = write_json(settings, "cpu", {"cases": results})
    figure = draw(results)
    figure.suptitle("One step with cold caches; dark: with hot ones", fontsize=9)
    save_picture(figure, path)


if __name__ == "__main__":
    main()
