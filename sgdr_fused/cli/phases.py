"""The phases of a schedule, and the steps at which to sample it for a drawing."""

from __future__ import annotations

from typing import NamedTuple

from sgdr_fused.schedule import CosineWarmRestarts

__all__ = ["Phase", "phases_of", "steps_to_draw"]


class Phase(NamedTuple):
    """The warm-up, a cycle, or the time after the last of ``n_cycles``.

    Attributes:
        name: ``"warm-up"``, the cycle's index, or ``"end"``.
        start: Its first step.
        steps: Number of its steps within the training.
        length: Number of its steps; more than ``steps`` if the training ends within it.
        first_lr: LR of its first step.
        last_lr: LR of its last step within the training.
    """

    name: str
    start: int
    steps: int
    length: int
    first_lr: float
    last_lr: float

    @property
    def is_cut_short(self) -> bool:
        """Whether the training ends within it."""
        return self.steps < self.length


def phases_of(schedule: CosineWarmRestarts, total_steps: int) -> list[Phase]:
    """The phases of a training, in order.

    Args:
        schedule: The schedule.
        total_steps: Length of the training in steps.

    Returns:
        The phases that begin below ``total_steps``.
    """
    bounds = [("warm-up", 0, schedule.warmup_steps)] if schedule.warmup_steps else []
    for cycle, start in enumerate([schedule.warmup_steps, *schedule.restarts(total_steps)]):
        bounds.append((str(cycle), start, schedule.cycle_length(cycle)))
    _, start, length = bounds[-1]
    if schedule.is_over(len(bounds) - bool(schedule.warmup_steps)):
        bounds.append(("end", start + length, max(0, total_steps - start - length)))
    phases = []
    for name, start, length in bounds:
        steps = min(length, total_steps - start)
        if steps > 0:
            first_lr, last_lr = schedule.lr_at(start), schedule.lr_at(start + steps - 1)
            phases.append(Phase(name, start, steps, length, first_lr, last_lr))
    return phases


def steps_to_draw(schedule: CosineWarmRestarts, total_steps: int, about: int) -> list[int]:
    """Steps whose LRs show the whole curve: evenly spaced ones, and those around each restart.

    Args:
        schedule: The schedule.
        total_steps: Length of the training in steps.
        about: Number of evenly spaced steps; a shorter training gives all of its steps.

    Returns:
        Step numbers in ascending order, including the first and the last step.
    """
    about = min(about, total_steps)
    spread = {i * total_steps // about for i in range(about)}
    turns = [schedule.warmup_steps, *schedule.restarts(total_steps)]
    around = {step for turn in turns for step in (turn - 1, turn) if 0 <= step < total_steps}
    return sorted(spread | around | {total_steps - 1})
