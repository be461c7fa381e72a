"""Writes the measured numbers into the pages: `python docs/tables.py`.

A page says where a table stands:

    <!-- table h100 -->
    <!-- end of table -->

This script fills it from ``benchmarks/results/`` and ``examples/``. A test runs it and finds
nothing to change, and finds no measured time outside of these tables: each has one source.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- table (\w+) -->\n(.*?)<!-- end of table -->", re.S)

OURS, OURS_IN_GRAPH = "FusedSGDR", "FusedSGDR in a CUDA graph"
FALLBACK = "FusedSGDR, reference"
FUSED = "SGD(fused=True) + scheduler"
IN_GRAPH = "SGD(fused=True) in a CUDA graph + scheduler"
# What the tables call the candidates.
NAMES = {
    OURS: "`FusedSGDR`",
    OURS_IN_GRAPH: "`FusedSGDR` in a graph",
    FALLBACK: "`FusedSGDR` without its native backend",
    "SGD(foreach=False) + scheduler": "pair, for-loop",
    "SGD(foreach=True) + scheduler": "pair, foreach",
    FUSED: "pair, fused",
    "SGD(fused=True), tensor LR + scheduler": "pair, fused, LR in a tensor",
    "compiled SGD, tensor LR + scheduler": "pair, compiled",
    IN_GRAPH: "pair, fused, in a graph",
}

Row = Sequence[str]


def results(path: str) -> dict[str, Any]:
    """A JSON file of the repository."""
    read: dict[str, Any] = json.loads((REPOSITORY / path).read_text())
    return read


def benchmark(name: str) -> dict[str, Any]:
    """A file of benchmarks/results/."""
    return results(f"benchmarks/results/{name}.json")


def time(microseconds: float) -> str:
    """Three digits, in µs or ms."""
    if microseconds < 999.5:
        return f"{microseconds:#.3g} µs".replace(". ", " ")
    return f"{microseconds / 1000:#.3g} ms".replace(". ", " ")


def is_equal(ratio: float) -> bool:
    """Whether two times are too close to call one of them shorter."""
    return abs(ratio - 1) < 0.03


def faster_in_bold(theirs: float, ours: float) -> tuple[str, str]:
    """Both times, the shorter in bold; neither if they are within 3 %."""
    texts = time(theirs), time(ours)
    if is_equal(theirs / ours):
        return texts
    return (f"**{texts[0]}**", texts[1]) if theirs < ours else (texts[0], f"**{texts[1]}**")


def table(header: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def machine(read: dict[str, Any]) -> str:
    """Where and when it was measured."""
    here = read["environment"]
    cpu = f"{here['cpu']}, {here['cores']} cores, {here['cpu_capability']}"
    return (
        f"{read['gpu']['name'] if read.get('gpu') else cpu}, torch {here['torch']}, {here['date']}"
    )


def measured_on(read: dict[str, Any], *benchmarks: str) -> str:
    """A line below a table of times: the machine, the date and the commands."""
    rounds = read["environment"]["rounds"]
    commands = ", ".join(f"`python -m benchmarks.{name}`" for name in benchmarks)
    return (
        f"\n{machine(read)}. Medians of {rounds} interleaved rounds in one process: {commands}.\n"
    )


def steps_of(case: dict[str, Any]) -> dict[str, float]:
    """Each candidate's time of one step until it is done, in µs."""
    return {entry["name"]: entry.get("step", entry)["median_us"] for entry in case["candidates"]}


# --------------------------------------------------------------------------------------- on a GPU


def h100() -> str:
    """The README's table: the fastest forms of the pair, eager and in a graph."""

    def row(case: dict[str, Any]) -> Row:
        steps = steps_of(case)
        eager = {n: us for n, us in steps.items() if not n.startswith(OURS) and n != IN_GRAPH}
        fastest = min(eager, key=eager.__getitem__)
        form = NAMES[fastest].removeprefix("pair, ")
        theirs, ours = faster_in_bold(eager[fastest], steps[OURS])
        return [
            case["title"],
            f"{theirs} ({form})",
            ours,
            *faster_in_bold(steps[IN_GRAPH], steps[OURS_IN_GRAPH]),
        ]

    read = benchmark("gpu_h100")
    header = ["", "pair, its fastest form", NAMES[OURS], "pair in a graph", NAMES[OURS_IN_GRAPH]]
    return table(header, map(row, read["cases"])) + measured_on(read, "gpu")


def _all_candidates(cases: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    of_case = [{entry["name"]: cell(entry) for entry in case["candidates"]} for case in cases]
    names = [name for name in NAMES if any(name in cells for cells in of_case)]
    return table(
        ["", *(case["title"] for case in cases)],
        [[NAMES[name], *(cells.get(name, "") for cells in of_case)] for name in names],
    )


def h100_steps() -> str:
    """Every candidate, until the GPU has finished."""
    read = benchmark("gpu_h100")
    by_step = _all_candidates(read["cases"], lambda entry: time(entry["step"]["median_us"]))
    return by_step + measured_on(read, "gpu")


def h100_kernels() -> str:
    """Every candidate's time on the GPU alone, and its launches."""

    def cell(entry: dict[str, Any]) -> str:
        return f"{time(entry['device_us'])} in {entry['launches']:g}"

    return _all_candidates(benchmark("gpu_h100")["cases"], cell)


def h100_graphs() -> str:
    """With and without a graph: until the GPU has finished, and what of it the host waits."""

    def row(case: dict[str, Any]) -> Row:
        entries = {entry["name"]: entry for entry in case["candidates"]}
        return [case["title"], *(cell(entries[name]) for name in names)]

    def cell(entry: dict[str, Any]) -> str:
        return f"{time(entry['step']['median_us'])}, host {time(entry['host']['median_us'])}"

    names = [FUSED, IN_GRAPH, OURS, OURS_IN_GRAPH]
    read = benchmark("gpu_h100")
    header = ["", *(NAMES[name] for name in names)]
    return table(header, map(row, read["cases"])) + measured_on(read, "gpu")


# --------------------------------------------------------------------------------------- on a CPU


def cpu() -> str:
    """The README's table: torch's fastest functions, FusedSGDR, and FusedSGDR's fallback."""

    def row(case: dict[str, Any]) -> Row:
        steps = steps_of(case)
        theirs, ours = faster_in_bold(steps[case["best_pair"]], steps[OURS])
        fallback = time(steps[FALLBACK]) if FALLBACK in steps else ""
        return [case["title"], theirs, ours, times_as_fast(case["speedup"]), fallback]

    read = benchmark("step")
    cases = read["cases"] + benchmark("one_pass")["cases"][:3]
    header = ["", "torch's fastest", NAMES[OURS], "", "without the native backend"]
    return table(header, map(row, cases)) + measured_on(read, "step", "one_pass")


def times_as_fast(ratio: float) -> str:
    """A ratio in words."""
    return "as fast" if is_equal(ratio) else f"{ratio:#.3g} times as fast"


def cpu_steps() -> str:
    """Every candidate on the CPU."""
    read = benchmark("step")
    by_step = _all_candidates(read["cases"], lambda entry: time(entry["median_us"]))
    return by_step + measured_on(read, "step")


def memory_floor() -> str:
    """How much of a large step a bare loop of the same loads and stores takes."""
    case = next(case for case in benchmark("step")["cases"] if case["memory_floors"])
    floor = min(entry["ratio"] for entry in case["candidates"] if "floor" in entry["name"])
    return (
        f"{case['title']}: a bare loop of the same loads and stores takes {floor:.2f} of "
        "`FusedSGDR`'s time.\n"
    )


def one_pass() -> str:
    """Clip, step and average; and momentum in bfloat16."""

    def row(case: dict[str, Any]) -> Row:
        steps = steps_of(case)
        ours = next(name for name in reversed(steps) if name.startswith(OURS))
        torchs = time(steps[case["best_pair"]])
        return [case["title"], torchs, f"**{time(steps[ours])}**", times_as_fast(case["speedup"])]

    read = benchmark("one_pass")
    cases = [case for case in read["cases"] if not case["title"].startswith("each option")]
    header = ["", "torch's fastest", NAMES[OURS], ""]
    return table(header, map(row, cases)) + measured_on(read, "one_pass")


def each_option() -> str:
    """What clipping and averaging add to a step."""

    def rows() -> Iterable[Row]:
        for case in read["cases"]:
            if case["title"].startswith("each option: "):
                steps = steps_of(case)
                without = steps.pop(OURS)
                options = (f"{time(us)} (+{us / without - 1:.0%})" for us in steps.values())
                yield [case["title"].removeprefix("each option: "), time(without), *options]

    read = benchmark("one_pass")
    return table(["", NAMES[OURS], "`max_grad_norm`", "`ema_decay`"], rows())


def small_tensors() -> str:
    """The price of one more tiny tensor."""

    def row(series: dict[str, Any]) -> Row:
        lists = series["lists"]
        slopes = (f"{entry['slope_ns_since_previous']:.0f} ns" for entry in lists[1:])
        return [f"{series['threads']}", *slopes]

    read = benchmark("small_tensors")
    counts = [entry["tensors"] for entry in read["series"][0]["lists"]]
    header = ["threads", *(f"{n} to {m} tensors" for n, m in pairwise(counts))]
    return table(header, map(row, read["series"])) + measured_on(read, "small_tensors")


def backward_memory() -> str:
    """Peak memory with and without step_in_backward()."""

    def row(way: dict[str, Any]) -> Row:
        return [way["name"], f"{way['rise_bytes'] / 2**20:.0f} MiB"]

    read = benchmark("backward_memory")
    header = ["", "peak on top of the parameters"]
    return table(header, map(row, read["ways"])) + f"\n{machine(read)}.\n"


# --------------------------------------------------------------------------------- of the examples


def bfloat16() -> str:
    """Test accuracy in bfloat16, by examples/bfloat16.py."""
    accuracies = results("examples/bfloat16.json")["accuracies"]
    return table(
        ["training", f"test accuracy, mean of {len(accuracies['float32'])} seeds"],
        [[name, f"{statistics.mean(values):.1%}"] for name, values in accuracies.items()],
    )


def paper() -> str:
    """Mean test errors, by examples/paper.py."""
    read = results("examples/paper.json")["results"]
    methods = list(read[0]["errors"])
    return table(
        ["training labels", *methods],
        [
            [
                f"{result['noise']:.0%} wrong" if result["noise"] else "clean",
                *(f"{statistics.mean(result['errors'][method]):.2f} %" for method in methods),
            ]
            for result in read
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        h100, h100_steps, h100_kernels, h100_graphs, cpu, cpu_steps, memory_floor, one_pass,
        each_option, small_tensors, backward_memory, bfloat16, paper,
    )
}  # fmt: skip


def with_tables(page: str) -> str:
    """The text of a page with its tables written anew."""
    return BLOCK.sub(lambda block: _block(block[1]), page)


def _block(name: str) -> str:
    return f"<!-- table {name} -->\n{TABLES[name]()}<!-- end of table -->"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
