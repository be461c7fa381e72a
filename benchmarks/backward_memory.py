"""Peak memory of a training step: step() after backward() against step_in_backward().

Each way trains the same model in its own process, which reports its peak resident memory minus the
peak before the first iteration.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Settings, parse_settings
from benchmarks.report import new_axes, print_table, write_results
from sgdr_fused import FusedSGDR

WAYS = {"step": "step() after backward()", "in_backward": "step_in_backward()"}
LAYERS = 24
ITERATIONS = 4


def train(way: str, width: int) -> dict[str, int]:
    """Trains for a few iterations.

    Args:
        way: A key of ``WAYS``.
        width: Width of the layers.

    Returns:
        ``grad_bytes`` of all gradients, and ``rise_bytes`` of the peak resident memory.
    """
    torch.manual_seed(0)
    layers = (torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS))
    model = torch.nn.Sequential(*layers)
    optimizer = FusedSGDR(model.parameters(), lr=1e-3, momentum=0.9, T_0=100)
    if way == "in_backward":
        optimizer.step_in_backward()
    inputs = torch.randn(8, width)
    before = _peak_bytes()
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    grads = 4 * LAYERS * width * width
    return {"grad_bytes": grads, "rise_bytes": _peak_bytes() - before}


def measure_way(way: str, width: int) -> dict[str, int]:
    """Runs :func:`train` in its own process."""
    # malloc then returns large blocks to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.backward_memory", "--child", way, str(width)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, int] = json.loads(run.stdout)
    return result


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Draws a bar for each way."""
    figure, (ax,) = new_axes(1, 1, height=1.8)
    bars = ax.barh(
        [row["name"] for row in rows],
        [row["rise_bytes"] / 2**20 for row in rows],
        color=["#e8b98a", "#1f4e79"],
        height=0.6,
    )
    ax.bar_label(bars, [f" {row['rise_bytes'] / 2**20:.0f} MiB" for row in rows], fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    gradients = rows[0]["grad_bytes"] / 2**20
    ax.set_title(
        f"Memory on top of the parameters: momentum and gradients, {gradients:.0f} MiB each",
        loc="left",
        fontsize=10,
    )
    return figure


def run(settings: Settings) -> list[dict[str, Any]]:
    """Measures both ways and prints a table."""
    width = 256 if settings.quick else 1024
    rows = [{"name": name, **measure_way(way, width)} for way, name in WAYS.items()]
    print_table(
        f"{LAYERS} layers of {width} x {width}, momentum",
        ("", "peak above the start", "gradients"),
        [
            (r["name"], f"{r['rise_bytes'] / 2**20:.1f} MiB", f"{r['grad_bytes'] / 2**20:.1f} MiB")
            for r in rows
        ],
    )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both ways; writes backward_memory.json and backward_memory.png."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        print(json.dumps(train(argv[1], int(argv[2]))))
        return
    settings = parse_settings(argv, __doc__)
    rows = run(settings)
    write_results(settings, "backward_memory", {"ways": rows}, draw(rows))


def _peak_bytes() -> int:
    # Not ru_maxrss, which starts at the parent process's value.
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert peak is not None
    return int(peak[1]) * 1024


if __name__ == "__main__":
    main()
