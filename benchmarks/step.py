"""One optimizer step on the CPU: all forms of the pair against FusedSGDR.

The pair is torch.optim.SGD with CosineAnnealingWarmRestarts, both stepped once a call. Everything
is float32, with momentum 0.9, weight decay 1e-4 and Nesterov.

The steps are repeated on the same tensors with nothing in between, so the caches stay hot. In a
training the forward and backward pass evict some of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from benchmarks import shapes
from benchmarks.harness import (
    OPTIONS,
    SCHEDULE,
    Build,
    Settings,
    Step,
    Timing,
    Workload,
    fused_sgdr,
    measure,
    parse_settings,
)
from benchmarks.memory_floor import floor_candidates
from benchmarks.report import new_axes, print_table, write_results

NATIVE = "FusedSGDR"
REFERENCE = "FusedSGDR, reference"
FLOOR = "memory floor"


@dataclass(frozen=True)
class Case:
    """A list of tensors to update, and the number of threads.

    Attributes:
        title: Title of the table.
        shapes: Shapes of the parameters.
        threads: Number of intra-op threads.
        has_floor: Whether to measure the memory floor too.
    """

    title: str
    shapes: shapes.Shapes
    threads: int
    has_floor: bool = False


def cases(settings: Settings) -> list[Case]:
    """The cases to measure."""
    threads = torch.get_num_threads()
    n_small = 20 if settings.quick else 1000
    small = shapes.small_tensors(n_small)
    resnet = shapes.resnet50(width=4, n_classes=10) if settings.quick else shapes.resnet50()
    narrow = " of width 4" if settings.quick else ""
    return [
        Case("MLP, 6 tensors, 10 k parameters", shapes.mlp(), threads),
        Case(f"{n_small} tensors of 64 elements", small, threads),
        Case(f"{n_small} tensors of 64 elements", small, 1),
        Case(f"ResNet-50{narrow}, 161 tensors", resnet, threads, has_floor=True),
    ]


def pair(compiled: bool = False, **how: bool) -> Build:
    """Builds the pair; passes ``how`` to torch.optim.SGD."""

    def build(params: list[Tensor]) -> tuple[Optimizer, Step]:
        # A compiled step needs a tensor LR: a float would be a constant of the graph.
        lr = torch.tensor(OPTIONS["lr"]) if compiled else OPTIONS["lr"]
        sgd = SGD(params, **OPTIONS | {"lr": lr}, **how)
        scheduler = CosineAnnealingWarmRestarts(sgd, **SCHEDULE)
        update = sgd.step
        if compiled:
            torch.compiler.reset()  # otherwise the last case's graphs count as recompilations
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # do not silently run eagerly
            update = torch.compile(lambda: sgd.step())

        def step() -> None:
            update()
            scheduler.step()

        return sgd, step

    return build


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Measures one case and prints its table."""
    builds: dict[str, Build] = {
        "SGD(foreach=False) + scheduler": pair(foreach=False),
        "SGD(foreach=True) + scheduler": pair(foreach=True),
        "SGD(fused=True) + scheduler": pair(fused=True),
    }
    if settings.flags["compiled"]:
        builds["compiled SGD + scheduler"] = pair(compiled=True, foreach=True)
    baselines = list(builds)
    builds[REFERENCE] = lambda params: fused_sgdr(params, backend="reference")
    builds[NATIVE] = fused_sgdr

    workload = Workload(case.shapes)
    candidates = [workload.candidate(n, case.threads, build) for n, build in builds.items()]
    floors = floor_candidates(workload, case.threads) if case.has_floor else []
    timings = measure([*candidates, *floors], settings)

    shown = [timings[name] for name in builds]
    if floors:
        fastest = min((timings[floor.name] for floor in floors), key=lambda t: t.median)
        shown.append(fastest)
    compared = compare(case, [timings[name] for name in baselines], shown, timings[NATIVE])
    return compared | {"memory_floors": [timings[floor.name].as_json() for floor in floors]}


def compare(
    case: Case, baselines: Sequence[Timing], shown: Sequence[Timing], native: Timing
) -> dict[str, Any]:
    """Prints a case's table and returns it as data.

    Args:
        case: The case.
        baselines: The timings that FusedSGDR is compared with.
        shown: All rows of the table.
        native: FusedSGDR's row.
    """
    best = min(baselines, key=lambda timing: timing.median)
    plural = "s" if case.threads > 1 else ""
    title = f"{case.title}, {case.threads} thread{plural}"
    print_table(
        title,
        ("", "median µs", "quartiles", "fastest", f"/ {native.name}"),
        [(t.name, *_cells(t), f"{t.ratio_to(native):.2f}") for t in shown],
    )
    print(f"  {best.ratio_to(native):.2f} times as fast as {best.name}")
    return {
        "title": title,
        "tensors": len(case.shapes),
        "elements": shapes.numel(case.shapes),
        "threads": case.threads,
        "candidates": [t.as_json() | {"ratio": round(t.ratio_to(native), 4)} for t in shown],
        "best_pair": best.name,
        "speedup": round(best.ratio_to(native), 4),
    }


def _cells(timing: Timing) -> tuple[str, str, str]:
    first, third = (f"{seconds * 1e6:.1f}" for seconds in timing.quartiles())
    return f"{timing.median * 1e6:.1f}", f"{first} .. {third}", f"{min(timing.seconds) * 1e6:.1f}"


def draw(results: Sequence[dict[str, Any]]) -> Any:
    """Draws a panel of bars for each case."""
    figure, axes = new_axes(len(results), 1, height=1.9 * len(results))
    for ax, case in zip(axes, results, strict=True):
        names = [c["name"].partition(", chunks")[0] for c in case["candidates"]]
        medians = [c["median_us"] for c in case["candidates"]]
        spread = [
            [c["median_us"] - c["quartiles_us"][0] for c in case["candidates"]],
            [c["quartiles_us"][1] - c["median_us"] for c in case["candidates"]],
        ]
        colors = [_color(name) for name in names]
        bars = ax.barh(names, medians, xerr=spread, color=colors, ecolor="0.3", height=0.7)
        labels = [
            f" {_duration(c['median_us'])}" + ("" if c["ratio"] == 1 else f"  ({c['ratio']:.3g}×)")
            for name, c in zip(names, case["candidates"], strict=True)
        ]
        ax.bar_label(bars, labels, fontsize=8, padding=2)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.25 * max(c["quartiles_us"][1] for c in case["candidates"]))
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(axis="y", length=0, labelsize=9)
        ax.set_title(case["title"], loc="left", fontsize=9, fontweight="bold")
    return figure


def _color(name: str) -> str:
    if name == FLOOR:
        return "#b8c4ce"
    return "#1f4e79" if name.startswith(NATIVE) and name != REFERENCE else "#e8b98a"


def _duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases; writes step.json and step.png."""
    settings = parse_settings(
        argv, __doc__, compiled="the pair under torch.compile too (takes minutes)"
    )
    results = [run_case(case, settings) for case in cases(settings)]
    write_results(settings, "step", {"cases": results}, draw(results))


if __name__ == "__main__":
    main()
