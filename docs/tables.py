"""Writes the measured numbers into the pages: `python docs/tables.py`, or `make readme`.

A page says where a table stands:

    <!-- table h100 -->
    <!-- end of table -->

This script fills it from ``benchmarks/results/`` and ``examples/``. A test runs it and finds
nothing to change, and finds no measured time outside of these tables: each has one source. Where a
file of results is missing, the page says how to make it.

A step's time is that with cold caches. Older results of a GPU have hot ones only.
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

GPU = "gpu_h100"
NOTED = "gpu_noted_h100"
OURS, OURS_IN_GRAPH = "FusedSGDR", "FusedSGDR in a CUDA graph"
FALLBACK = "FusedSGDR, reference"
FUSED = "SGD(fused=True) + scheduler"
IN_GRAPH = "SGD(fused=True) in a CUDA graph + scheduler"
# What the tables call the candidates; these are the tables' columns, in this order.
NAMES = {
    OURS: "`FusedSGDR`",
    OURS_IN_GRAPH: "`FusedSGDR` in a graph",
    FUSED: "pair, fused",
    "SGD(foreach=True) + scheduler": "pair, foreach",
    "SGD(foreach=False) + scheduler": "pair, for-loop",
    "SGD(fused=True), tensor LR + scheduler": "pair, fused, LR in a tensor",
    "compiled SGD, tensor LR + scheduler": "pair, compiled",
    IN_GRAPH: "pair, fused, in a graph",
    "pytorch_optimizer SGDW + scheduler": "pytorch_optimizer",
    "bitsandbytes SGD + scheduler": "bitsandbytes",
    "apex FusedSGD + scheduler": "apex",
    "TransformerEngine FusedSGD + scheduler": "TransformerEngine",
    "optax, jit, donated buffers": "optax, jitted",
    "clip, SGD(fused=True) + scheduler, EMA": "pair, fused",
    "clip, SGD(foreach=True) + scheduler, EMA": "pair, foreach",
    "clip, SGD(fused=True), EMA in a CUDA graph + scheduler": "pair, fused, in a graph",
    FALLBACK: "`FusedSGDR` without its native backend",
}

Row = Sequence[str]


def results(path: str) -> dict[str, Any]:
    """A JSON file of the repository."""
    read: dict[str, Any] = json.loads((REPOSITORY / path).read_text())
    return read


def benchmark(name: str) -> dict[str, Any]:
    """A file of benchmarks/results/."""
    read: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return read


def time(microseconds: float) -> str:
    """Three digits, in µs or ms."""
    if microseconds < 999.5:
        return f"{microseconds:#.3g} µs".replace(". ", " ")
    return f"{microseconds / 1000:#.3g} ms".replace(". ", " ")


def is_equal(ratio: float) -> bool:
    """Whether two times are too close to call one of them shorter."""
    return abs(ratio - 1) < 0.03


def may_be_equal(timing: dict[str, Any]) -> bool:
    """Whether the interval of the ratio to ours holds 1."""
    low, high = timing["ratio_interval"]
    return bool(low <= 1 <= high)


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
    where = [read["gpu"]["name"] if read.get("gpu") else cpu]
    if "commit" in here:
        where += [f"{here['threads']} threads", here["allocator"], f"commit {here['commit']}"]
    return ", ".join([*where, f"torch {here['torch']}", here["date"]])


def measured_on(read: dict[str, Any], benchmark: str) -> str:
    """A line below a table of times: the machine, the date and the command."""
    rounds = read["environment"]["rounds"]
    cases = read.get("cases", [])
    hot = " with hot caches" if cases and "cold" not in cases[0]["candidates"][0] else ""
    busy = read["environment"]["load_before"] > 0.3
    warning = " Other processes ran at the same time: do not quote." if busy else ""
    how = f"Medians of up to {rounds} rounds{hot}, each with all candidates in turn"
    return f"\n{machine(read)}. {how}: `python -m benchmarks.{benchmark}`.{warning}\n"


def shown(entry: dict[str, Any]) -> dict[str, Any]:
    """A candidate's timing: cold; hot in older results."""
    timing: dict[str, Any] = entry.get("cold") or entry["step"]
    return timing


def steps_of(case: dict[str, Any]) -> dict[str, float]:
    """Each candidate's time of one step until it is done, in µs."""
    return {entry["name"]: shown(entry)["median_us"] for entry in case["candidates"]}


def torchs_fastest(case: dict[str, Any], caches: str = "") -> dict[str, Any]:
    """The fastest eager form of the pair, "hot" or as shown."""
    forms = [
        entry
        for entry in case["candidates"]
        if NAMES.get(entry["name"], "").startswith("pair, ")
        and NAMES[entry["name"]] != NAMES[IN_GRAPH]
    ]
    return min(forms, key=lambda entry: float((entry.get(caches) or shown(entry))["median_us"]))


def entry_of(case: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of a candidate, or of one that the tables call the same."""
    entries = [entry for entry in case["candidates"] if entry["name"] == name]
    same = (entry for entry in case["candidates"] if NAMES.get(entry["name"]) == NAMES.get(name))
    return entries[0] if entries else next(same)


def picture(name: str, what: str) -> str:
    """A benchmark's picture, where there is one."""
    path = RESULTS / f"{name}.png"
    return f"\n![{what}](../benchmarks/results/{name}.png)\n" if path.exists() else ""


# --------------------------------------------------------------------------------------- on a GPU


def cases_of_the_picture(read: dict[str, Any]) -> list[dict[str, Any]]:
    """The first plain steps, which the README's picture shows."""
    return [case for case in read["cases"] if IN_GRAPH in steps_of(case)][:4]


def h100() -> str:
    """The README's table: the fastest forms of the pair, eager and in a graph."""

    def row(case: dict[str, Any]) -> Row:
        steps, fastest = steps_of(case), torchs_fastest(case)["name"]
        form = NAMES[fastest].removeprefix("pair, ")
        theirs, ours = faster_in_bold(steps[fastest], steps[OURS])
        return [
            case["title"],
            f"{theirs} ({form})",
            ours,
            *faster_in_bold(shown(entry_of(case, IN_GRAPH))["median_us"], steps[OURS_IN_GRAPH]),
        ]

    read, by_hand = benchmark(GPU), benchmark(NOTED)
    clipped = by_hand["steps"][0]
    whole_step = [clipped["title"], *faster_in_bold(clipped["pair_us"], clipped["ours_us"]), "", ""]
    training = _noted_training(by_hand["trainings"][0])
    training[0] = f"a whole training step: {training[0]}"
    rows = [*map(row, read["cases"][:4]), whole_step, training]
    header = ["", "pair, its fastest form", NAMES[OURS], "pair in a graph", NAMES[OURS_IN_GRAPH]]
    noted = "The last two rows are medians noted by hand.\n"
    return table(header, rows) + measured_on(read, "gpu") + noted


def _noted_training(entry: dict[str, Any]) -> list[str]:
    """A training's row: eagerly, and as one CUDA graph."""
    eager = faster_in_bold(entry["pair_us"], entry["ours_us"])
    in_graph = faster_in_bold(entry["pair_in_graph_us"], entry["ours_in_graph_us"])
    return [entry["title"], *eager, *in_graph]


def _noted_on(read: dict[str, Any]) -> str:
    """A line below a table of what was noted by hand."""
    here = read["environment"]
    return f"\n{read['gpu']['name']}, torch {here['torch']}, {here['date']}. {read['how']}\n"


def h100_trainings() -> str:
    """One iteration of whole trainings."""
    read = benchmark(NOTED)
    header = ["one iteration", "pair", NAMES[OURS], "pair in a graph", NAMES[OURS_IN_GRAPH]]
    return table(header, map(_noted_training, read["trainings"])) + _noted_on(read)


def h100_one_pass() -> str:
    """Clip, step and average."""
    read = benchmark(NOTED)
    rows = [[e["title"], *faster_in_bold(e["pair_us"], e["ours_us"])] for e in read["steps"]]
    header = ["", "`clip_grad_norm_`, pair, `lerp_`", NAMES[OURS]]
    return table(header, rows) + _noted_on(read)


def _all_candidates(cases: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for each case, a column for each candidate of one."""
    rows = [
        {NAMES[e["name"]]: cell(e) for e in c["candidates"] if e["name"] in NAMES} for c in cases
    ]
    names = [name for name in dict.fromkeys(NAMES.values()) if any(name in row for row in rows)]
    return table(
        ["", *names],
        [
            [case["title"], *(row.get(name, "") for name in names)]
            for case, row in zip(cases, rows, strict=True)
        ],
    )


def h100_steps() -> str:
    """Every candidate, until the GPU has finished."""
    read = benchmark(GPU)
    return _all_candidates(read["cases"], lambda e: time(shown(e)["median_us"])) + measured_on(
        read, "gpu"
    )


def h100_kernels() -> str:
    """Every candidate's time on the GPU alone, and its launches."""

    def cell(entry: dict[str, Any]) -> str:
        if "device_us" not in entry:
            return ""
        return f"{time(entry['device_us'])} in {entry['launches']:g}"

    return _all_candidates(benchmark(GPU)["cases"], cell)


def h100_graphs() -> str:
    """With and without a graph: until the GPU has finished, and what of it the host waits."""

    def cell(entry: dict[str, Any]) -> str:
        burst = entry.get("step") or entry["hot"]
        return f"{time(burst['median_us'])}, host {time(entry.get('host', burst)['median_us'])}"

    names = [FUSED, IN_GRAPH, OURS, OURS_IN_GRAPH]
    read = benchmark(GPU)
    cases = read["cases"]
    header = ["", *(NAMES[name] for name in names)]
    rows = [[case["title"], *(cell(entry_of(case, name)) for name in names)] for case in cases]
    return table(header, rows) + measured_on(read, "gpu")


def machine_code() -> str:
    """What the compiler makes of the kernels, for an H100."""
    registers_of_a_multiprocessor, threads_of_a_block = 65536, 256

    def row(kernel: dict[str, Any]) -> Row:
        # They are given out by eight.
        registers = -(-kernel["registers"] // 8) * 8
        blocks = registers_of_a_multiprocessor // (threads_of_a_block * registers)
        per_element = [
            f"{kernel[f'{dtype}_instructions_per_element']:.4g}"
            if f"{dtype}_instructions_per_element" in kernel
            else ""
            for dtype in ("float32", "bfloat16")
        ]
        return [kernel["kernel"], str(kernel["registers"]), str(blocks), *per_element]

    kernels: list[dict[str, Any]] = json.loads((RESULTS / "machine_code.json").read_text())
    header = ["kernel", "registers", "blocks on a multiprocessor", "float32", "bfloat16"]
    rows = [row(kernel) for kernel in kernels if kernel["architecture"] == "sm_90"]
    return table(header, rows) + "\n`python -m benchmarks.machine_code`.\n"


def gpu_training() -> str:
    """Whole trainings on a GPU."""
    return _training("gpu_training_h100")


# --------------------------------------------------------------------------------------- on a CPU


def cpu() -> str:
    """The README's table: torch's fastest functions and FusedSGDR, cold and hot."""

    def row(case: dict[str, Any]) -> Row:
        theirs, ours = torchs_fastest(case), entry_of(case, OURS)
        form = NAMES[theirs["name"]].removeprefix("pair, ")
        times = shown(theirs)["median_us"], shown(ours)["median_us"]
        cells = map(time, times) if may_be_equal(shown(theirs)) else faster_in_bold(*times)
        cold_of_theirs, cold_of_ours = cells
        ratios = [
            "as fast" if may_be_equal(timing) else times_as_fast(timing["ratio"])
            for timing in (shown(theirs), torchs_fastest(case, "hot")["hot"])
        ]
        return [case["title"], f"{cold_of_theirs} ({form})", cold_of_ours, *ratios]

    read = benchmark("cpu")
    header = ["", "torch's fastest, cold", "`FusedSGDR`, cold", "cold", "hot"]
    return table(header, map(row, read["cases"][:6])) + measured_on(read, "steps")


def times_as_fast(ratio: float) -> str:
    """A ratio in words."""
    return "as fast" if is_equal(ratio) else f"{ratio:#.3g} times as fast"


def cpu_cold() -> str:
    """Every candidate on the CPU, with cold caches."""
    read = benchmark("cpu")
    cold = _all_candidates(read["cases"], lambda entry: time(entry["cold"]["median_us"]))
    return cold + measured_on(read, "steps") + picture("cpu", "The same numbers as bars")


def cpu_hot() -> str:
    """Every candidate on the CPU, with hot caches."""
    return _all_candidates(benchmark("cpu")["cases"], lambda entry: time(entry["hot"]["median_us"]))


def cpu_spread() -> str:
    """How certain the ratios to the fastest form of the pair are."""

    def cell(timing: dict[str, Any]) -> str:
        low, high = timing["ratio_interval"]
        return f"{timing['ratio']:.3g} ({low:.3g} to {high:.3g})"

    def row(case: dict[str, Any]) -> Row:
        fastest = [(torchs_fastest(case, caches), caches) for caches in ("cold", "hot")]
        cells = [f"{cell(entry[caches])}, {NAMES[entry['name']]}" for entry, caches in fastest]
        return [case["title"], *cells]

    header = ["", "cold, against", "hot, against"]
    return table(header, map(row, benchmark("cpu")["cases"]))


def pair_wins() -> str:
    """Where another form of SGD is certainly faster on the CPU."""
    lines = [
        f"- {case['title']}, {caches}: {NAMES[entry['name']]} takes "
        f"{entry[caches]['ratio']:.2f} of `FusedSGDR`'s time.\n"
        for case in benchmark("cpu")["cases"]
        for entry in case["candidates"]
        for caches in ("cold", "hot")
        if entry["name"] in NAMES and entry[caches]["ratio_interval"][1] < 1
    ]
    return "".join(lines) or "- Nowhere: each interval of a ratio holds 1 or more.\n"


def left_out() -> str:
    """Who does not take part on the CPU, and why."""
    cases = [case for case in benchmark("cpu")["cases"] if case["left_out"]]
    where: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for left in case["left_out"].items():
            where.setdefault(left, []).append(case["title"])
    rows = [
        [
            NAMES.get(name, name),
            why,
            "everywhere" if len(titles) == len(cases) else "; ".join(titles),
        ]
        for (name, why), titles in where.items()
    ]
    return table(["left out", "why", "where"], rows)


def memory_floor() -> str:
    """How much of a large step a bare loop of the same loads and stores takes."""
    lines = []
    for case in benchmark("cpu")["cases"]:
        floors = [e["cold"]["ratio"] for e in case["candidates"] if "floor" in e["name"]]
        lines += [
            f"- {case['title']}: a bare loop of the same loads and stores takes {floor:.2f} of "
            "`FusedSGDR`'s time.\n"
            for floor in floors
        ]
    return "".join(lines)


def one_pass() -> str:
    """Clip, step and average; and momentum in bfloat16."""
    bfloat16_momentum = f"{OURS}, momentum in bfloat16"

    def row(title: str, case: dict[str, Any], name: str) -> Row:
        theirs, ours = torchs_fastest(case), entry_of(case, name)
        # Within each round both are compared with the step without that option.
        ratio = theirs["cold"]["ratio"] / ours["cold"]["ratio"]
        hot = theirs["hot"]["ratio"] / ours["hot"]["ratio"]
        cells = faster_in_bold(theirs["cold"]["median_us"], ours["cold"]["median_us"])
        return [title, *cells, times_as_fast(ratio), times_as_fast(hot)]

    read = benchmark("cpu")
    rows = [row(c["title"], c, OURS) for c in read["cases"] if c["title"].startswith("clip")]
    for case in read["cases"]:
        if bfloat16_momentum in steps_of(case):
            rows.append(row(f"momentum in bfloat16: {case['title']}", case, bfloat16_momentum))
    header = ["", "torch's fastest, cold", "`FusedSGDR`, cold", "cold", "hot"]
    return table(header, rows) + measured_on(read, "steps")


def each_option() -> str:
    """What clipping, averaging and bfloat16 momentum add to a step, with cold caches."""
    options = ["max_grad_norm", "ema_decay", "momentum in bfloat16"]
    rows: list[Row] = []
    for case in benchmark("cpu")["cases"]:
        entries = {entry["name"]: entry["cold"] for entry in case["candidates"]}
        added = [entries.get(f"{OURS}, {option}") for option in options]
        if any(added):
            cells = [
                f"{time(cold['median_us'])} ({cold['ratio'] - 1:+.0%})" if cold else ""
                for cold in added
            ]
            rows.append([case["title"], time(entries[OURS]["median_us"]), *cells])
    header = ["", NAMES[OURS], "`max_grad_norm`", "`ema_decay`", "momentum in bfloat16"]
    return table(header, rows)


def small_tensors() -> str:
    """The price of one more tiny tensor."""
    read = benchmark("scaling")
    # Of fewer tensors the difference is lost in noise.
    points = [point for point in read["series"][0]["points"] if point["size"] >= 10]

    def row(name: str, caches: str) -> Row:
        microseconds = [entry_of(point, name)[caches]["median_us"] for point in points]
        slopes = [
            f"{1000 * (us[1] - us[0]) / (size[1] - size[0]):.0f} ns"
            for us, size in zip(
                pairwise(microseconds), pairwise(p["size"] for p in points), strict=True
            )
        ]
        return [f"{NAMES[name]}, {caches}", *slopes]

    header = ["", *(f"{n['size']} to {m['size']}" for n, m in pairwise(points))]
    rows = [row(name, caches) for name in (OURS, FUSED) for caches in ("cold", "hot")]
    return table(header, rows) + measured_on(read, "scaling")


def scaling() -> str:
    """The picture of a step's time against sizes."""
    benchmark("scaling")
    return picture("scaling", "Time of a step against the number of tensors and of elements")


def training() -> str:
    """Whole trainings on the CPU."""
    return _training("training")


def _training(name: str) -> str:
    read = benchmark(name)
    rows = []
    for model in read["models"]:
        for entry in model["candidates"]:
            ratio = 1 / entry["hot"]["ratio"]
            per_second = f"{entry['iterations_per_second']:#.4g}".removesuffix(".")
            rows.append([model["title"], entry["name"], per_second, f"{ratio:.3f}"])
    header = ["", "", "iterations a second", "times the eager pair's"]
    return table(header, rows) + measured_on(read, "training")


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
        h100, h100_trainings, h100_one_pass, h100_steps, h100_kernels, h100_graphs, machine_code,
        gpu_training, cpu, cpu_cold, cpu_hot, cpu_spread, pair_wins, left_out, memory_floor,
        one_pass, each_option, small_tensors, scaling, training, backward_memory, bfloat16, paper,
    )
}  # fmt: skip


def with_tables(page: str) -> str:
    """The text of a page with its tables written anew."""
    return BLOCK.sub(lambda block: _block(block[1]), page)


def _block(name: str) -> str:
    try:
        text = TABLES[name]()
    except FileNotFoundError as missing:
        file = Path(missing.filename).name
        text = f"Not measured yet: there is no `{file}`.\n"
    return f"<!-- table {name} -->\n{text}<!-- end of table -->"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
