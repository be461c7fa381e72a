"""The cosine schedule with warm restarts, in closed form and plain Python.

The native backends advance the same schedule step by step, and are tested against this file.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

from sgdr_fused.values import (
    AT_LEAST_0,
    LENGTH,
    LONGEST,
    STEP,
    choice,
    floats,
    integers,
    or_none,
)

__all__ = ["RANGES", "CosineWarmRestarts", "Position", "fit_T_0"]

Anneal = Literal["step", "epoch"]

RANGES = {
    "lr": AT_LEAST_0,
    "T_0": LENGTH,
    "T_mult": floats("a finite float >= 1", lambda value: 1 <= value < math.inf),
    "eta_min": AT_LEAST_0,
    "steps_per_epoch": LENGTH,
    "anneal": choice(*get_args(Anneal)),
    "warmup_steps": integers(0, LONGEST, "an integer from 0 to 2**53"),
    "warmup_start_lr": AT_LEAST_0,
    "cycle_decay": floats("a float from 0 to 1", lambda value: 0 <= value <= 1),
    "n_cycles": or_none(integers(1, 2**61, "an integer from 1 to 2**61")),
}
"""The values of each option of :class:`CosineWarmRestarts`, whose fields are in this order."""
# Cycles grow up to this one, the later ones are as long. Each length is rounded to whole steps, so
# that no formula gives the start of a cycle: it is a sum, which this keeps short. A T_mult of 1.004
# and more reaches the longest cycle before.
_LAST_GROWING_CYCLE = 10_000
# restarts() makes no longer list.
_MOST_RESTARTS = 10**6


class Position(NamedTuple):
    """A place in the schedule, before a step.

    Attributes:
        step: Optimizer steps applied so far.
        cycle: Cycles that have ended, by their length or by a restart.
        T_cur: Steps since the cycle began; below zero during warm-up.
        T_i: Length of the cycle in steps.
    """

    step: int
    cycle: int
    T_cur: int
    T_i: int


@dataclass(frozen=True)
class CosineWarmRestarts:
    r"""Cosine annealing with warm restarts (SGDR), optionally with warm-up, shrinking peaks and an
    end.

    Cycle :math:`i` lasts :math:`T_i = \mathrm{round}(T_0 \cdot \mathtt{steps\_per\_epoch} \cdot
    T_\mathrm{mult}^i)` steps (cycles grow up to number 10,000 and to :math:`2^{53}` steps), in
    which

    .. math::
        \eta = \eta_{min} + (\mathtt{lr} - \eta_{min}) \cdot \mathtt{cycle\_decay}^i \cdot
        \frac{1 + \cos(\pi \, T_{cur} / T_i)}{2}, \qquad T_{cur} = 0, \dots, T_i - 1.

    With the default options this is :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`,
    stepped once an optimizer step, to the bit. At restarts it is exact where ``step(epoch)`` of the
    torch scheduler is not.

    Args:
        lr: Peak of the first cycle, :math:`\eta_{max}`.
        T_0: Length of the first cycle, in epochs of ``steps_per_epoch`` steps.
        T_mult: Factor by which each cycle is longer than the one before; a real number >= 1.
        eta_min: LR that each cycle descends to; at most ``lr``.
        steps_per_epoch: Optimizer steps in an epoch, the unit of ``T_0``.
        anneal: ``"step"`` changes the LR at each step; ``"epoch"`` keeps it for an epoch, as when
            torch's ``scheduler.step()`` is called once an epoch.
        warmup_steps: Steps of a linear ramp, once, before the first cycle.
        warmup_start_lr: LR of the ramp's first step.
        cycle_decay: Factor by which each cycle's peak, measured from ``eta_min``, is lower than
            the one before.
        n_cycles: Number of cycles after which the LR stays at ``eta_min``; None: endless.

    Raises:
        ValueError: An argument is out of its range.

    References:
        Loshchilov and Hutter, *SGDR: Stochastic Gradient Descent with Warm Restarts*, ICLR 2017,
        https://arxiv.org/abs/1608.03983, equation 5.
    """

    lr: float
    T_0: int
    T_mult: float = 1
    eta_min: float = 0.0
    steps_per_epoch: int = 1
    anneal: Anneal = "step"
    warmup_steps: int = 0
    warmup_start_lr: float = 0.0
    cycle_decay: float = 1.0
    n_cycles: int | None = None

    def __post_init__(self) -> None:
        """Check every option, and make plain Python numbers of them."""
        for name, values in RANGES.items():
            # The way to set a field of a frozen dataclass.
            object.__setattr__(self, name, values.plain(name, getattr(self, name)))
        if self.T_0 * self.steps_per_epoch > LONGEST:
            raise ValueError(
                f"T_0={self.T_0} epochs of steps_per_epoch={self.steps_per_epoch} are more than "
                "2**53 steps; lower one of them"
            )
        if self.eta_min > self.lr:
            raise ValueError(
                f"eta_min={self.eta_min} is above lr={self.lr}, so the LR would rise within a "
                "cycle; lower eta_min or raise lr (each param group can have its own)"
            )

    @classmethod
    def of_group(cls, param_group: Mapping[str, Any]) -> CosineWarmRestarts:
        """The schedule of a :class:`FusedSGDR` param group, whose peak is ``initial_lr``.

        Args:
            param_group: One of ``optimizer.param_groups``.

        Returns:
            The schedule that the group follows.
        """
        options = {f.name: param_group[f.name] for f in fields(cls) if f.name != "lr"}
        return cls(lr=param_group["initial_lr"], **options)

    def cycle_length(self, cycle: int) -> int:
        """Length of a cycle in steps, :math:`T_i`.

        Args:
            cycle: Index of the cycle, from 0.

        Returns:
            Number of optimizer steps.

        Raises:
            ValueError: ``cycle`` is negative or not an integer.
        """
        cycle = STEP.plain("cycle", cycle)
        return _cycle_length(self.T_0 * self.steps_per_epoch, self.T_mult, cycle)

    def cycle_start(self, cycle: int) -> int:
        """Number of steps before a cycle, the warm-up's among them, without calls of ``restart()``.

        Args:
            cycle: Index of the cycle, from 0.

        Returns:
            The step at which the cycle begins.

        Raises:
            ValueError: ``cycle`` is negative or not an integer.
        """
        cycle = STEP.plain("cycle", cycle)
        if cycle == 0:
            return self.warmup_steps
        starts = _starts(self.T_0 * self.steps_per_epoch, self.T_mult)
        last = min(cycle, len(starts) - 1)
        alike = (cycle - last) * self.cycle_length(last)
        return self.warmup_steps + starts[last] + alike

    def position(self, step: int) -> Position:
        """The schedule's position after ``step`` steps without a call of ``restart()``.

        Args:
            step: Number of steps applied, from 0 to 2**61.

        Returns:
            The position before the next step.

        Raises:
            ValueError: ``step`` is out of its range or not an integer.
        """
        step = STEP.plain("step", step)
        cycle = self._cycle_at(step)
        if self.n_cycles is not None:
            cycle = min(cycle, self.n_cycles)
        return Position(step, cycle, step - self.cycle_start(cycle), self.cycle_length(cycle))

    def _cycle_at(self, step: int) -> int:
        """The cycle of a step, as if there were no ``n_cycles``."""
        done = step - self.warmup_steps
        if done < self.cycle_length(0):
            return 0
        starts = _starts(self.T_0 * self.steps_per_epoch, self.T_mult)
        cycle = bisect_right(starts, done) - 1
        if cycle == len(starts) - 1:
            cycle += (done - starts[cycle]) // self.cycle_length(cycle)
        return cycle

    def advance(self, position: Position) -> Position:
        """The position one step later."""
        step, cycle, T_cur, T_i = position
        if T_cur + 1 < T_i or self.is_over(cycle):
            return Position(step + 1, cycle, T_cur + 1, T_i)
        return Position(step + 1, cycle + 1, 0, self.cycle_length(cycle + 1))

    def restart(self, position: Position) -> Position:
        """The position after a warm restart now.

        Args:
            position: The position before the restart.

        Returns:
            The start of the next cycle, at the same step.

        Raises:
            ValueError: ``n_cycles`` allows no further cycle.
        """
        cycle = position.cycle + 1
        if self.is_over(cycle):
            raise ValueError(
                f"restart() would begin cycle {cycle}, but the schedule ends after "
                f"n_cycles={self.n_cycles}; raise n_cycles or set it to None"
            )
        return Position(position.step, cycle, 0, self.cycle_length(cycle))

    def is_restart(self, position: Position) -> bool:
        """Whether a cycle other than the first begins at a position."""
        return position.T_cur == 0 < position.cycle and not self.is_over(position.cycle)

    def ends_cycle(self, position: Position) -> bool:
        """Whether the step taken at a position is the last of its cycle."""
        return position.T_cur + 1 >= position.T_i and not self.is_over(position.cycle)

    def is_over(self, cycle: int) -> bool:
        """Whether a cycle comes after the last of ``n_cycles``."""
        return self.n_cycles is not None and cycle >= self.n_cycles

    def changes_lr(self, position: Position) -> bool:
        """Whether the LR at a position can differ from that of the step before."""
        every = self.steps_per_epoch if self.anneal == "epoch" else 1
        return position.T_cur <= 0 or position.T_cur % every == 0

    def lr_of(self, position: Position) -> float:
        """LR of the step taken at a position."""
        if position.T_cur < 0:
            done = position.T_cur + self.warmup_steps
            return (
                self.warmup_start_lr + (self.lr - self.warmup_start_lr) * done / self.warmup_steps
            )
        if self.is_over(position.cycle):
            return self.eta_min
        every = self.steps_per_epoch if self.anneal == "epoch" else 1
        T_cur, T_i = position.T_cur // every, position.T_i / every
        amplitude = (self.lr - self.eta_min) * _power(self.cycle_decay, position.cycle)
        return self.eta_min + amplitude * (1 + math.cos(math.pi * T_cur / T_i)) / 2

    def lr_at(self, step: int) -> float:
        """LR of step number ``step``, counted from 0."""
        return self.lr_of(self.position(step))

    def restarts(self, total_steps: int) -> list[int]:
        """The steps below ``total_steps`` at which a cycle other than the first begins.

        Args:
            total_steps: Length of the training in steps.

        Returns:
            Step numbers in ascending order.

        Raises:
            ValueError: ``total_steps`` is negative or not an integer, or has more than a million.
        """
        total_steps = STEP.plain("total_steps", total_steps)
        cycles = self._cycle_at(total_steps - 1)
        if self.n_cycles is not None:
            cycles = min(cycles, self.n_cycles - 1)
        if cycles > _MOST_RESTARTS:
            raise ValueError(
                f"total_steps={total_steps} has {cycles} restarts, too many for a list; ask for "
                "cycle_start(cycle) or position(step) instead"
            )
        return [self.cycle_start(cycle) for cycle in range(1, cycles + 1)]


def fit_T_0(total_steps: int, n_cycles: int, T_mult: float = 1) -> int:
    """The longest first cycle for which ``n_cycles`` cycles fit into a budget.

    The best weights of an SGDR run are those at the end of a cycle, so a budget should end there.
    Warm-up does not count: subtract it first.

    Args:
        total_steps: The budget, in the unit of ``T_0`` (epochs or steps).
        n_cycles: Number of cycles wanted.
        T_mult: Factor by which each cycle is longer than the one before.

    Returns:
        ``T_0``, in the same unit.

    Raises:
        ValueError: Not even ``T_0=1`` fits, or an argument is out of its range.

    Example:
        >>> fit_T_0(total_steps=90, n_cycles=3, T_mult=2)  # 12 + 24 + 48 = 84
        12
    """
    total_steps = LENGTH.plain("total_steps", total_steps)
    n_cycles = LENGTH.plain("n_cycles", n_cycles)
    T_mult = RANGES["T_mult"].plain("T_mult", T_mult)

    growths = [_power(T_mult, i) for i in range(min(n_cycles, _LAST_GROWING_CYCLE + 1))]

    def total(T_0: int) -> int:
        lengths = [_in_steps(T_0 * growth) for growth in growths]
        return sum(lengths) + (n_cycles - len(lengths)) * lengths[-1]

    if total_steps < total(1):
        raise ValueError(
            f"total_steps={total_steps} is too short for n_cycles={n_cycles} with T_mult={T_mult}: "
            f"T_0=1 takes {total(1)}; lower n_cycles or T_mult"
        )
    # No cycle is shorter than the first.
    fits, too_long = 1, min(total_steps // n_cycles, LONGEST) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if total(middle) <= total_steps:
            fits = middle
        else:
            too_long = middle
    return fits


def _cycle_length(first: int, T_mult: float, cycle: int) -> int:
    return _in_steps(float(first) * _power(T_mult, min(cycle, _LAST_GROWING_CYCLE)))


def _in_steps(length: float) -> int:
    return round(length) if length < LONGEST else LONGEST


@lru_cache(maxsize=16)
def _starts(first: int, T_mult: float) -> Sequence[int]:
    """Where cycles start, counted from the end of the warm-up; the last and all later are alike.

    Args:
        first: Length of the first cycle in steps.
        T_mult: Factor by which each cycle is longer than the one before.
    """
    starts = [0]
    last = 0 if T_mult == 1 else _LAST_GROWING_CYCLE
    while len(starts) <= last:
        length = _cycle_length(first, T_mult, len(starts) - 1)
        if length == LONGEST:
            break
        starts.append(starts[-1] + length)
    return starts


def _power(base: float, exponent: int) -> float:
    # By squaring: the same multiplications as in csrc/sgdr_math.h, hence the same bits.
    result, base = 1.0, float(base)
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
