"""The phases of a schedule, and the steps at which to sample it for a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

from sgdr_fused.schedule import CosineWarmRestarts

__all__ = ["Phase", "Phases", "beginning_of", "steps_to_draw"]


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


class Phases(Sequence[Phase]):
    """The phases of a training, in order; each is computed when it is asked for.

    Args:
        schedule: The schedule.
        total_steps: Length of the training in steps.
    """

    def __init__(self, schedule: CosineWarmRestarts, total_steps: int) -> None:
        self._schedule = schedule
        self._total_steps = total_steps
        self._has_warmup = schedule.warmup_steps > 0
        self.n_cycles = _cycles_begun(schedule, total_steps)
        """Number of cycles that begin within the training."""
        has_end = self.n_cycles > 0 and schedule.position(total_steps - 1).cycle == self.n_cycles
        self._length = self._has_warmup + self.n_cycles + has_end

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Phase: ...

    @overload
    def __getitem__(self, index: slice) -> list[Phase]: ...

    def __getitem__(self, index: int | slice) -> Phase | list[Phase]:
        chosen = range(len(self))[index]
        return self._phase(chosen) if isinstance(chosen, int) else [*map(self._phase, chosen)]

    def _phase(self, index: int) -> Phase:
        schedule, cycle = self._schedule, index - self._has_warmup
        if cycle < 0:
            name, start, length = "warm-up", 0, schedule.warmup_steps
        elif cycle < self.n_cycles:
            name, start = str(cycle), schedule.cycle_start(cycle)
            length = schedule.cycle_length(cycle)
        else:
            start = schedule.cycle_start(cycle)
            name, length = "end", self._total_steps - start
        steps = min(length, self._total_steps - start)
        first_lr, last_lr = schedule.lr_at(start), schedule.lr_at(start + steps - 1)
        return Phase(name, start, steps, length, first_lr, last_lr)


def beginning_of(schedule: CosineWarmRestarts, total_steps: int, n_cycles: int) -> int:
    """Steps of a training until so many cycles have ended; all of them if it has no more cycles.

    Args:
        schedule: The schedule.
        total_steps: Length of the training in steps.
        n_cycles: Number of cycles.
    """
    if _cycles_begun(schedule, total_steps) <= n_cycles:
        return total_steps
    return schedule.cycle_start(n_cycles)


def steps_to_draw(schedule: CosineWarmRestarts, total_steps: int, about: int) -> list[int]:
    """Steps whose LRs show the whole curve: evenly spaced ones, and those around restarts.

    Args:
        schedule: The schedule.
        total_steps: Length of the training in steps.
        about: Number of evenly spaced steps, and of restarts; all if there are fewer.

    Returns:
        Step numbers in ascending order, including the first and the last step.
    """
    turns = map(schedule.cycle_start, _spread(_cycles_begun(schedule, total_steps), about))
    around = {step for turn in turns for step in (turn - 1, turn) if step >= 0}
    return sorted({*_spread(total_steps, about), *around, total_steps - 1})


def _spread(n: int, about: int) -> list[int]:
    """The integers below ``n``, or so many of them, evenly spaced."""
    about = min(about, n)
    return [i * n // about for i in range(about)]


def _cycles_begun(schedule: CosineWarmRestarts, total_steps: int) -> int:
    """Number of cycles that begin within a training."""
    position = schedule.position(total_steps - 1)
    if position.T_cur < 0:
        return 0
    return position.cycle + (not schedule.is_over(position.cycle))
