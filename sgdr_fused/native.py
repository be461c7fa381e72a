"""Loads the native extension, or says why there is none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["extension", "is_profiling", "why_missing"]

REBUILD = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> tuple[Any, str]:
    """The extension and an empty string, or None and the reason."""
    try:
        built_for = importlib.import_module("sgdr_fused._built_for").TORCH_VERSION
    except ImportError:
        return None, (
            "the native extension was not built when sgdr_fused was installed "
            "(was there a C++ compiler, and torch?); " + REBUILD
        )
    # Checked before loading: with another torch's layouts the extension would crash, not raise.
    if built_for != torch.__version__:
        return None, (
            f"the native extension was built for torch {built_for}, "
            f"but this is torch {torch.__version__}; {REBUILD}"
        )
    try:
        return importlib.import_module("sgdr_fused._native"), ""
    except ImportError as error:
        return None, f"the native extension does not load ({error}); {REBUILD}"


extension, why_missing = _load()

is_profiling: Callable[[], bool] = getattr(extension, "is_profiling", lambda: True)
"""Whether a profiler is recording; always True without the extension, which is asked for it."""
