"""Tables, JSON files and pictures of what the benchmarks measure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import BUSY_LOAD, Settings

__all__ = [
    "environment",
    "new_axes",
    "print_table",
    "save_picture",
    "write_json",
    "write_results",
]


def environment() -> dict[str, Any]:
    """The machine and the versions that the numbers depend on."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sgdr_fused": importlib.metadata.version("sgdr_fused"),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints an aligned table: the first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  " + "   ".join(cells))


def new_axes(n_rows: int, n_columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure for the README, 800 pixels wide there, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=200, layout="constrained", facecolor="white")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write_results(settings: Settings, name: str, results: dict[str, Any], figure: Any) -> None:
    """Writes NAME.json and NAME.png, with the machine in both.

    Args:
        settings: The folder to write to.
        name: The benchmark's name.
        results: The measurements.
        figure: Their picture.
    """
    save_picture(figure, write_json(settings, name, results))


def write_json(settings: Settings, name: str, results: dict[str, Any]) -> Path:
    """Writes NAME.json, with the machine; returns its path."""
    here = environment() | {"load_before": settings.load_before, "rounds": settings.rounds}
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{name}.json"
    path.write_text(json.dumps({"environment": here, **results}, indent=1) + "\n")
    print(f"\nwrote {path.name}")
    return path


def save_picture(figure: Any, path: Path) -> None:
    """Writes the picture of some results next to them, with the machine in it.

    Args:
        figure: The picture.
        path: The results, as :func:`write_json` writes them.
    """
    here = json.loads(path.read_text())["environment"]
    where = f"{here['cpu']}, {here['cores']} cores, {here['cpu_capability']}, torch {here['torch']}"
    if here["load_before"] > BUSY_LOAD:
        where += f"; other processes used {here['load_before']} cores: do not quote"
    figure.supxlabel(where, fontsize=8, color="0.45")
    figure.savefig(path.with_suffix(".png"))
    print(f"wrote {path.stem}.png")
