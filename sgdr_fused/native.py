"""Finds and loads the native extension, or says why there is none."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgdr_fused.building.recipe import PACKAGE, BuiltFor, covers

__all__ = [
    "HOW_TO_BUILD",
    "builds_here",
    "built_for",
    "cache",
    "check_gpu",
    "extension",
    "folder",
    "is_profiling",
    "why_missing",
]

HOW_TO_BUILD = "run: sgdr-fused build"

_HERE = BuiltFor.here(torch.__version__)


def cache() -> Path:
    """The folder in which ``sgdr-fused build`` keeps its builds."""
    if chosen := os.environ.get("SGDR_FUSED_CACHE"):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sgdr_fused"


def builds_here() -> list[Path]:
    """The builds in the cache that fit this torch, this Python and these sources, newest first."""
    name = f"torch-{_HERE.torch}_{_HERE.python}_{_HERE.sources}_"
    found = cache().glob(f"{name}*/{BuiltFor.FILE}")
    newest_first = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in newest_first]


class _Loaded(NamedTuple):
    extension: Any
    folder: Path | None
    built_for: BuiltFor | None
    why_missing: str


def _load() -> _Loaded:
    """The extension, where it is and what it fits; or three times None, and the reason."""
    why_not = ""
    for folder in _candidates():
        built_for = BuiltFor.read(folder)
        if built_for is None:
            continue
        # Checked before loading: with another torch's layouts the extension would crash, not raise.
        why_not = _mismatch(built_for)
        if not why_not:
            try:
                return _Loaded(_import_from(folder), folder, built_for, "")
            except ImportError as error:
                why_not = f"the native backend in {folder} does not load ({error})"
    why_not = why_not or f"the native backend is not built for torch {torch.__version__}"
    return _Loaded(None, None, None, f"{why_not}{_shadowed()}; {HOW_TO_BUILD}")


def _candidates() -> Iterator[Path]:
    yield PACKAGE
    yield from builds_here()


def _mismatch(built_for: BuiltFor) -> str:
    for what in ("torch", "python", "sources"):
        theirs, ours = getattr(built_for, what), getattr(_HERE, what)
        if theirs != ours:
            return f"the native backend was built for {what} {theirs}, but this is {ours}"
    return ""


def _import_from(folder: Path) -> Any:
    name = "sgdr_fused._native"
    paths = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next(filter(Path.exists, paths), None)
    spec = path and importlib.util.spec_from_file_location(name, path)
    if not spec or not spec.loader:
        raise ImportError("the file is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _shadowed() -> str:
    """Says that Python has found a source tree before the installed package, if it has."""
    if not (PACKAGE.parent / "setup.py").exists():
        return ""
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != PACKAGE.parent]
    installed = PathFinder.find_spec("sgdr_fused", elsewhere)
    if installed is None or installed.origin is None:
        return ""
    place = Path(installed.origin).parent
    if BuiltFor.read(place) is None:
        return ""
    return (
        f"; this is the source tree {PACKAGE.parent}, which hides the package installed in "
        f"{place}: start Python in another folder"
    )


extension, folder, built_for, why_missing = _load()


def check_gpu(device: torch.device) -> None:
    """Raises if the extension has no code for a GPU.

    Raises:
        RuntimeError: It is built for other architectures.
    """
    capability = torch.cuda.get_device_capability(device)
    if built_for is not None and not covers(built_for.cuda_architectures, capability):
        gpu = f"{device} ({torch.cuda.get_device_name(device)})"
        raise RuntimeError(
            f"the native backend is built for compute capability {built_for.cuda_architectures}, "
            f"but {gpu} has {capability[0]}.{capability[1]}; {HOW_TO_BUILD}, "
            'or pass backend="reference"'
        )


is_profiling: Callable[[], bool] = getattr(extension, "is_profiling", lambda: True)
"""Whether a profiler is recording; always True without the extension, which is asked for it."""
