"""matplotlib, which is optional, or what to install."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "pyplot_for"]


def new_figure(caller: str, width: float, height: float) -> Figure:
    """A figure that belongs to no window.

    Args:
        caller: What needs it, for the error.
        width: In inches.
        height: In inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure: Figure = _import("matplotlib.figure", caller).Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def pyplot_for(caller: str) -> Any:
    """matplotlib.pyplot.

    Args:
        caller: What needs it, for the error.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return _import("matplotlib.pyplot", caller)


def _import(module: str, caller: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller} needs matplotlib; run: pip install matplotlib", name=error.name
        ) from error
