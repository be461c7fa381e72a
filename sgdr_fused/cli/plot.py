"""The schedule drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgdr_fused.cli.phases import Phases, steps_to_draw
from sgdr_fused.pictures import pyplot_for
from sgdr_fused.schedule import CosineWarmRestarts
from sgdr_fused.values import LENGTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_schedule"]

# More points than a screen has pixels across.
_POINTS = 5000
_MOST_LINES = 100


def plot_schedule(schedule: CosineWarmRestarts, total_steps: int, ax: Axes | None = None) -> Axes:
    """Draw the LR over a training, with a dotted line at each restart if there are at most 100.

    Each cycle is drawn to its end, from where the LR rises vertically; with ``anneal="epoch"`` as
    stairs. Needs matplotlib: ``pip install matplotlib``.

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
        ax = pyplot_for("plot_schedule()").gca()
    unit = schedule.steps_per_epoch
    times, lrs = [], []
    for step in steps_to_draw(schedule, total_steps, _POINTS):
        if schedule.is_restart(schedule.position(step)):
            times.append(step / unit)
            lrs.append(_lr_towards(schedule, step))
        times.append(step / unit)
        lrs.append(schedule.lr_at(step))
    times.append(total_steps / unit)
    lrs.append(_lr_towards(schedule, total_steps))
    ax.plot(times, lrs, drawstyle="steps-post" if schedule.anneal == "epoch" else "default")
    n_cycles = Phases(schedule, total_steps).n_cycles
    for cycle in range(1, n_cycles if n_cycles <= _MOST_LINES + 1 else 1):
        restart = schedule.cycle_start(cycle)
        ax.axvline(restart / unit, color="0.7", linestyle=":", linewidth=0.8, zorder=0)
    ax.set_xlabel("step" if unit == 1 else "epoch")
    ax.set_ylabel("learning rate")
    ax.set_xlim(0, total_steps / unit)
    return ax


def _lr_towards(schedule: CosineWarmRestarts, step: int) -> float:
    """What the LR goes towards before a step, if no cycle begins there."""
    before = schedule.position(step - 1)
    if schedule.anneal == "epoch":
        return schedule.lr_of(before)
    return schedule.lr_of(before._replace(step=step, T_cur=before.T_cur + 1))
