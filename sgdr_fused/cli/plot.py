"""The schedule drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgdr_fused.cli.phases import steps_to_draw
from sgdr_fused.schedule import CosineWarmRestarts
from sgdr_fused.values import LENGTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_schedule"]

# More points than a screen has pixels across.
_POINTS = 5000


def plot_schedule(schedule: CosineWarmRestarts, total_steps: int, ax: Axes | None = None) -> Axes:
    """Draw the LR over a training, with a dotted line at each restart.

    Needs matplotlib: ``pip install "sgdr_fused[plot]"``.

    Args:
        schedule: The schedule; that of an optimizer is
            ``CosineWarmRestarts.of_group(optimizer.param_groups[0])``.
        total_steps: Length of the training in steps.
        ax: Axes to draw into; None: matplotlib's current ones.

    Returns:
        The axes. Their x-axis is in epochs if ``steps_per_epoch`` is above 1, else in steps.

    Raises:
        ValueError: ``total_steps`` is not an integer >= 1.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> schedule = CosineWarmRestarts(lr=0.1, T_0=10, T_mult=2)
        >>> ax = plot_schedule(schedule, total_steps=70)
    """
    total_steps = LENGTH.plain("total_steps", total_steps)
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.gca()
    unit = schedule.steps_per_epoch
    steps = steps_to_draw(schedule, total_steps, _POINTS)
    ax.plot([step / unit for step in steps], [schedule.lr_at(step) for step in steps])
    for restart in schedule.restarts(total_steps):
        ax.axvline(restart / unit, color="0.7", linestyle=":", linewidth=0.8, zorder=0)
    ax.set_xlabel("step" if unit == 1 else "epoch")
    ax.set_ylabel("learning rate")
    ax.set_xlim(0, total_steps / unit)
    return ax
