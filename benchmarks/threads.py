"""The size from which a second thread pays.

FusedSGDR's step on one thread and on two, over one large tensor and over tensors of 64 elements.
Below ``kParallelNumel`` elements (in csrc/) the library uses one thread, so both times are equal:
to measure smaller sizes, lower the constant, rebuild and run this again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.harness import Candidate, Workload, fused_sgdr, measure, parse_settings
from benchmarks.report import new_axes, print_table, write_results

LAYOUTS = ("one tensor", "tensors of 64 elements")
THRESHOLD = re.compile(r"kParallelNumel = (?:(\d+) << )?(\d+);")


def parallel_numel() -> int | None:
    """The library's threshold, read from csrc/; None if it is not a plain number."""
    for header in (Path(__file__).parent.parent / "csrc").rglob("*.h"):
        if match := THRESHOLD.search(header.read_text()):
            return int(match[2]) if match[1] is None else int(match[1]) << int(match[2])
    return None


def draw(results: Sequence[dict[str, Any]], threshold: int | None) -> Any:
    """Draws how much faster two threads are."""
    figure, (ax,) = new_axes(1, 1, height=3.6)
    for layout, color in zip(LAYOUTS, ("#1f4e79", "#d9822b"), strict=True):
        rows = [row for row in results if row["layout"] == layout]
        elements = [row["elements"] for row in rows]
        ax.plot(elements, [row["speedup"] for row in rows], "o-", color=color, label=layout)
    ax.axhline(1, color="0.6", linewidth=1)
    if threshold is not None:
        ax.axvline(threshold, color="0.6", linewidth=1, linestyle=":")
        ax.annotate(" kParallelNumel", (threshold, 0.02), xycoords=("data", "axes fraction"))
    ax.set_xscale("log", base=2)
    ax.set_ylim(0, 2.1)
    ax.set_xlabel("elements")
    ax.set_ylabel("1 thread's time / 2 threads'")
    ax.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all sizes; writes threads.json and threads.png."""
    settings = parse_settings(argv, __doc__)
    sizes = [1 << exponent for exponent in (range(12, 15) if settings.quick else range(12, 23))]
    candidates: dict[tuple[str, int, int], Candidate] = {}
    for layout in LAYOUTS:
        for size in sizes:
            each = size if layout == LAYOUTS[0] else 64
            workload = Workload(shapes.small_tensors(size // each, numel_each=each))
            for threads in (1, 2):
                name = f"{layout}, {size} elements, threads={threads}"
                candidate = workload.candidate(name, threads, fused_sgdr)
                candidates[layout, size, threads] = candidate
    timings = measure(list(candidates.values()), settings)

    results = []
    for layout in LAYOUTS:
        rows = []
        for size in sizes:
            one, two = (timings[candidates[layout, size, threads].name] for threads in (1, 2))
            speedup = one.ratio_to(two)
            medians = (f"{one.median * 1e6:.1f}", f"{two.median * 1e6:.1f}")
            rows.append((str(size), *medians, f"{speedup:.2f}"))
            results.append(
                {
                    "layout": layout,
                    "elements": size,
                    "speedup": round(speedup, 4),
                    "timings": [one.as_json() | {"threads": 1}, two.as_json() | {"threads": 2}],
                }
            )
        header = ("elements", "1 thread µs", "2 threads µs", "1 thread / 2 threads")
        print_table(layout.capitalize(), header, rows)
    threshold = parallel_numel()
    print(f"  kParallelNumel = {threshold}")
    everything = {"kParallelNumel": threshold, "sizes": results}
    write_results(settings, "threads", everything, draw(results, threshold))


if __name__ == "__main__":
    main()
