"""Tables, JSON files and pictures of what the benchmarks measure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import BUSY_LOAD, Settings, last_level_cache_bytes

__all__ = [
    "duration",
    "environment",
    "gpu_properties",
    "new_axes",
    "print_environment",
    "print_table",
    "save_picture",
    "write_json",
    "write_results",
]

# Packages whose versions matter, where they are installed.
PEERS = ("jax", "optax", "pytorch_optimizer", "bitsandbytes", "apex", "transformer_engine", "numpy")


def environment() -> dict[str, Any]:
    """The machine and the versions that the numbers depend on."""
    versions = {name: _version(name) for name in PEERS}
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache_mib": last_level_cache_bytes() / (1 << 20),
        "allocator": _allocator(),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sgdr_fused": importlib.metadata.version("sgdr_fused"),
        "peers": {name: version for name, version in versions.items() if version},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def gpu_properties() -> dict[str, Any] | None:
    """The GPU; None if there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "l2_cache_mib": properties.L2_cache_size / (1 << 20),
        "cuda": torch.version.cuda,
    }


def print_environment() -> None:
    """Prints the machine and the versions."""
    for name, value in (environment() | (gpu_properties() or {})).items():
        print(f"  {name}: {value}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _allocator() -> str:
    """Who answers malloc: a library that was preloaded, or the C library."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    preloaded = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if f"lib{name}" in loaded]
    return preloaded[0] if preloaded else " ".join(platform.libc_ver()) or "the system's"


def _chosen(path: str) -> str:
    """The choice in brackets in a file of the kernel."""
    text = Path(path).read_text() if Path(path).exists() else ""
    return text.partition("[")[2].partition("]")[0]


def _commit() -> str:
    """The commit, with a + if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Results and pages change while the benchmarks run.
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/sgdr_fused", ":/csrc"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)


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
    print(f"\n{title}", flush=True)
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  " + "   ".join(cells))


def duration(microseconds: float) -> str:
    """Three digits, in µs or ms."""
    if microseconds < 999.5:
        return f"{microseconds:#.3g} µs".replace(". ", " ")
    return f"{microseconds / 1000:#.3g} ms".replace(". ", " ")


def new_axes(n_rows: int, n_columns: int, height: float, width: float = 8) -> tuple[Any, list[Any]]:
    """A figure, and its axes by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
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
