"""``ema_decay`` as a function of the number of applied steps."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from sgdr_fused.values import LONGEST, choice, floats, integers, or_none

__all__ = ["EmaSchedule", "ScheduledDecay", "evaluate_ema_decay"]

_FROM_0_TO_1 = floats("a float from 0 to 1", lambda value: 0 <= value <= 1)
_POSITIVE = floats("a finite float > 0", lambda value: 0 < value < math.inf)
_RANGES = {
    "decay": floats("a float in [0, 1)", lambda value: 0 <= value < 1),
    "start_step": integers(0, LONGEST, "an integer from 0 to 2**53"),
    "every": integers(1, LONGEST, "an integer from 1 to 2**53"),
    "warmup": or_none(choice("ratio", "power")),
    "gamma": _POSITIVE,
    "power": _POSITIVE,
}


@dataclass(frozen=True)
class EmaSchedule:
    r"""A decay with a warm-up, a start and an interval, for ``FusedSGDR(ema_decay=...)``.

    With :math:`n` steps since ``start_step`` it is

    .. math::
        d = \min\left(\mathtt{decay}, \frac{1 + n}{10 + n}\right)
        \quad\text{or}\quad
        d = \min(\mathtt{decay}, 1 - (1 + n / \mathtt{gamma})^{-\mathtt{power}})

    for ``warmup="ratio"`` and ``"power"``. Up to ``start_step`` it is 0, so that the average is the
    parameter, and between two updates 1, so that the average stays as it is.

    Args:
        decay: The decay that the warm-up rises to, in [0, 1).
        start_step: Step from which the average is kept: ``update_after_step`` of diffusers and
            timm.
        every: Steps from one update of the average to the next.
        warmup: ``"ratio"``: as TensorFlow's ``ExponentialMovingAverage`` and, by default,
            diffusers' ``EMAModel``. ``"power"``: as timm's ``ModelEmaV3`` with ``use_warmup`` and
            ``EMAModel`` with ``use_ema_warmup``. None: the decay is ``decay`` from the start.
        gamma: Only for ``"power"``: ``warmup_gamma`` of timm, ``inv_gamma`` of diffusers.
        power: Only for ``"power"``: ``warmup_power`` of timm, ``power`` of diffusers.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> EmaSchedule(decay=0.999)(90)
        0.91

    References:
        ``diffusers/training_utils.py`` of https://github.com/huggingface/diffusers;
        ``timm/utils/model_ema.py`` of https://github.com/huggingface/pytorch-image-models.
    """

    decay: float = 0.9999
    start_step: int = 0
    every: int = 1
    warmup: Literal["ratio", "power"] | None = "ratio"
    gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        """Check every argument."""
        for name, values in _RANGES.items():
            # The dataclass is frozen.
            object.__setattr__(self, name, values.plain(name, getattr(self, name)))

    def __call__(self, step: int) -> float:
        """The decay of the update after a step.

        Args:
            step: Number of steps applied before it.
        """
        n = step - self.start_step
        if n <= 0:
            return 0.0
        if n % self.every != 0:
            return 1.0
        if self.warmup == "ratio":
            return min(self.decay, (1 + n) / (10 + n))
        if self.warmup == "power":
            return min(self.decay, 1 - math.pow(1 + n / self.gamma, -self.power))
        return self.decay


class ScheduledDecay(float):
    """The decay that a function gave for one step, together with the function.

    It takes the function's place in ``param_group["ema_decay"]``. To a step it is a number; that it
    can be called tells that it has to be evaluated again for the next one.

    Args:
        decay: The function's value.
        function: The function.
        step: Its argument.
    """

    function: Callable[[int], float]
    step: int

    def __new__(  # noqa: D102
        cls, decay: float, function: Callable[[int], float], step: int
    ) -> ScheduledDecay:
        self = super().__new__(cls, decay)
        self.function, self.step = function, step
        return self

    def __call__(self, step: int) -> float:
        """The function's value at a step."""
        return self.function(step)

    def __getnewargs__(self) -> tuple[float, Any, int]:  # type: ignore[override]
        return float(self), self.function, self.step

    def __repr__(self) -> str:
        return f"{float(self)!r}, from {self.function!r}"


def evaluate_ema_decay(group: MutableMapping[str, Any]) -> None:
    """Evaluates a function that is a group's ``ema_decay``, once for each applied step.

    Args:
        group: A param group. If its ``step`` is on a GPU, this synchronizes.

    Raises:
        ValueError: The function's value is no decay.
    """
    decay = group["ema_decay"]
    if not callable(decay):
        return
    step = int(group["step"])
    if isinstance(decay, ScheduledDecay):
        if decay.step == step:
            return
        decay = decay.function
    value = _FROM_0_TO_1.plain(f"ema_decay({step})", decay(step))
    group["ema_decay"] = ScheduledDecay(value, decay, step)
