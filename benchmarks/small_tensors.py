"""The cost of one more small tensor in a step of FusedSGDR.

Lists of 10 to 10,000 tensors of 64 elements, and a straight line fitted to the times. The fit
weights each time by its inverse, so that short lists count as much as long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.harness import Timing, Workload, fused_sgdr, measure, parse_settings
from benchmarks.report import new_axes, print_table, write_results

N_TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)


def fit_line(n_tensors: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """The line with the least squared relative error.

    Args:
        n_tensors: Lengths of the lists.
        seconds: Seconds of a step, for each list.

    Returns:
        Intercept in seconds, and slope in seconds a tensor.
    """
    times = torch.tensor(seconds, dtype=torch.float64)
    counts = torch.tensor(n_tensors, dtype=torch.float64)
    matrix = torch.stack([torch.ones_like(counts), counts], dim=1) / times[:, None]
    intercept, slope = torch.linalg.lstsq(matrix, torch.ones_like(times)[:, None]).solution
    return intercept.item(), slope.item()


def report(threads: int, counts: Sequence[int], timings: Sequence[Timing]) -> dict[str, Any]:
    """Fits, prints the table and returns the results for one number of threads."""
    medians = [timing.median for timing in timings]
    intercept, slope = fit_line(counts, medians)
    slopes = [
        (medians[i] - medians[i - 1]) / (counts[i] - counts[i - 1]) for i in range(1, len(counts))
    ]
    rows = []
    for i, timing in enumerate(timings):
        first, third = timing.quartiles()
        rows.append(
            (
                str(counts[i]),
                f"{timing.median * 1e6:.2f}",
                f"{first * 1e6:.2f} .. {third * 1e6:.2f}",
                f"{slopes[i - 1] * 1e9:.1f}" if i else "",
                f"{100 * (medians[i] / (intercept + slope * counts[i]) - 1):+.0f} %",
            )
        )
    print_table(
        f"Tensors of 64 elements, {threads} thread{'s' if threads > 1 else ''}",
        ("tensors", "median µs", "quartiles", "ns for one more", "off the line"),
        rows,
    )
    print(
        f"  straight line: {intercept * 1e6:.2f} µs + {slope * 1e9:.1f} ns a tensor; "
        f"at its steepest {max(slopes) * 1e9:.1f} ns"
    )
    return {
        "threads": threads,
        "intercept_us": round(intercept * 1e6, 3),
        "slope_ns": round(slope * 1e9, 2),
        "steepest_slope_ns": round(max(slopes) * 1e9, 2),
        "lists": [
            timing.as_json() | {"tensors": count, "slope_ns_since_previous": local}
            for timing, count, local in zip(
                timings, counts, [None, *(round(s * 1e9, 2) for s in slopes)], strict=True
            )
        ],
    }


def draw(results: Sequence[dict[str, Any]]) -> Any:
    """Draws the time a tensor; it falls to a constant if the time of a step is linear."""
    figure, (ax,) = new_axes(1, 1, height=3.6)
    for series, color in zip(results, ("#1f4e79", "#d9822b"), strict=False):
        counts = [entry["tensors"] for entry in series["lists"]]
        each = [1000 * entry["median_us"] / entry["tensors"] for entry in series["lists"]]
        line = [1000 * series["intercept_us"] / count + series["slope_ns"] for count in counts]
        plural = "s" if series["threads"] > 1 else ""
        fit = f"{series['intercept_us']:.2f} µs + {series['slope_ns']:.0f} ns a tensor"
        label = f"{series['threads']} thread{plural}: {fit}"
        ax.plot(counts, each, "o", color=color)
        ax.plot(counts, line, color=color, label=label)
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tensors of 64 elements")
    ax.set_ylabel("ns a tensor")
    ax.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all lists; writes small_tensors.json and small_tensors.png."""
    settings = parse_settings(argv, __doc__)
    counts = N_TENSORS[:3] if settings.quick else N_TENSORS
    numbers_of_threads = sorted({1, torch.get_num_threads()})
    candidates = {}
    for count in counts:
        workload = Workload(shapes.small_tensors(count))
        for threads in numbers_of_threads:
            name = f"{count} tensors, threads={threads}"
            candidates[threads, count] = workload.candidate(name, threads, fused_sgdr)
    timings = measure(list(candidates.values()), settings)
    results = [
        report(threads, counts, [timings[candidates[threads, count].name] for count in counts])
        for threads in numbers_of_threads
    ]
    write_results(settings, "small_tensors", {"series": results}, draw(results))


if __name__ == "__main__":
    main()
