"""The options of FusedSGDR: one table, from which every other list of options is derived."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sgdr_fused.schedule import is_finite

__all__ = [
    "GROUP_OPTIONS",
    "OPTIONS",
    "REQUIRED",
    "Backend",
    "Clipping",
    "Option",
    "Range",
    "Support",
    "check_group_options",
    "check_option",
    "checked_clipping",
]

Backend = Literal["auto", "native", "reference"]

REQUIRED = object()
"""Stands in the table where an option has no default."""


class Support(Enum):
    """How the pair of torch.optim.SGD and its scheduler, or the registered op, takes an option."""

    BY_NAME = "under the same name, with the same meaning"
    CONVERTED = "under another name or in another unit"
    DEFAULT_ONLY = "not at all: it cannot do what another value than the default asks for"
    NOT_NEEDED = "not at all, and it does not need to"


class Range(NamedTuple):
    """The values that an option may have.

    Attributes:
        contains: Whether a value is one of them.
        words: Their description, to follow "must be" in a message.
    """

    contains: Callable[[Any], bool]
    words: str


class Option(NamedTuple):
    """One option, a row of the table.

    Attributes:
        name: The argument of FusedSGDR and, if ``per_group``, the key in a param group.
        default: Default of the argument, or :data:`REQUIRED`.
        pair: How the pair takes it.
        op: How ``torch.ops.sgdr_fused.fused_step_`` takes it.
        range: Its values. None: any value counts by its truth, or CosineWarmRestarts checks it.
        per_group: Whether each param group has a value of its own.
    """

    name: str
    default: Any
    pair: Support
    op: Support
    range: Range | None = None
    per_group: bool = True


class Clipping(NamedTuple):
    """The options that need the norm of all gradients.

    Attributes:
        max_grad_norm: The gradients are scaled down to at most this norm; None: they are not.
        skip_nonfinite: A step whose gradients hold an infinity or NaN is skipped.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False

    @property
    def needs_norm(self) -> bool:
        """Whether a step has to compute the norm."""
        return self.max_grad_norm is not None or self.skip_nonfinite


_MOMENTUM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_FINITE = Range(is_finite, "a finite float")
_AT_LEAST_0 = Range(lambda value: is_finite(value) and value >= 0, "a finite float >= 0")
# On a GPU the LR is a tensor, and reading it would synchronize.
_LR = Range(
    lambda value: isinstance(value, Tensor) or (is_finite(value) and value >= 0),
    _AT_LEAST_0.words,
)
_NORM_OR_NONE = Range(
    lambda value: value is None or (is_finite(value) and value > 0), "None or a finite float > 0"
)
_EMA_DECAY = Range(
    lambda value: value is None or value == "swa" or (is_finite(value) and 0 <= value < 1),
    'None, a float in [0, 1), or "swa"',
)
_MOMENTUM_DTYPE = Range(
    lambda value: value in (None, *_MOMENTUM_DTYPES),
    f"None or one of {', '.join(map(str, _MOMENTUM_DTYPES))}",
)
_SEED = Range(lambda value: type(value) is int and 0 <= value < 2**64, "an int from 0 to 2**64 - 1")
_BACKEND = Range(lambda value: value in get_args(Backend), f"one of {get_args(Backend)}")

_BY_NAME, _CONVERTED = Support.BY_NAME, Support.CONVERTED
_DEFAULT_ONLY, _NOT_NEEDED = Support.DEFAULT_ONLY, Support.NOT_NEEDED

# In the order of FusedSGDR's arguments.
OPTIONS = (
    # name, default, pair, op, range
    Option("lr", 1e-3, _BY_NAME, _CONVERTED, _LR),
    Option("momentum", 0, _BY_NAME, _BY_NAME, _AT_LEAST_0),
    Option("dampening", 0, _BY_NAME, _BY_NAME, _FINITE),
    Option("weight_decay", 0, _BY_NAME, _BY_NAME, _AT_LEAST_0),
    Option("nesterov", False, _BY_NAME, _BY_NAME),
    # CosineWarmRestarts defines and checks the schedule's options, up to n_cycles.
    Option("T_0", REQUIRED, _CONVERTED, _CONVERTED),
    Option("T_mult", 1, _CONVERTED, _BY_NAME),
    Option("eta_min", 0.0, _CONVERTED, _BY_NAME),
    Option("steps_per_epoch", 1, _CONVERTED, _CONVERTED),
    Option("anneal", "step", _CONVERTED, _CONVERTED),
    # The pair needs no warm-up: to_pair() hands over after its end only.
    Option("warmup_steps", 0, _NOT_NEEDED, _BY_NAME),
    Option("warmup_start_lr", 0.0, _NOT_NEEDED, _BY_NAME),
    Option("cycle_decay", 1.0, _DEFAULT_ONLY, _BY_NAME),
    Option("n_cycles", None, _DEFAULT_ONLY, _BY_NAME),
    Option("reset_momentum", False, _DEFAULT_ONLY, _BY_NAME),
    Option("maximize", False, _BY_NAME, _BY_NAME),
    Option("decoupled_weight_decay", False, _DEFAULT_ONLY, _BY_NAME),
    Option("max_grad_norm", None, _DEFAULT_ONLY, _DEFAULT_ONLY, _NORM_OR_NONE, per_group=False),
    Option("skip_nonfinite", False, _DEFAULT_ONLY, _DEFAULT_ONLY, per_group=False),
    Option("ema_decay", None, _DEFAULT_ONLY, _DEFAULT_ONLY, _EMA_DECAY),
    Option("momentum_dtype", None, _DEFAULT_ONLY, _DEFAULT_ONLY, _MOMENTUM_DTYPE),
    Option("stochastic_rounding", False, _DEFAULT_ONLY, _DEFAULT_ONLY),
    Option("master_weights", False, _DEFAULT_ONLY, _DEFAULT_ONLY),
    # Only stochastic rounding draws random numbers.
    Option("seed", 0, _NOT_NEEDED, _NOT_NEEDED, _SEED),
    Option("backend", "auto", _NOT_NEEDED, _NOT_NEEDED, _BACKEND, per_group=False),
)

GROUP_OPTIONS = tuple(option for option in OPTIONS if option.per_group)

_RANGES = {option.name: option.range for option in OPTIONS if option.range is not None}
_RANGES_OF_GROUP = tuple(
    (option.name, option.range) for option in GROUP_OPTIONS if option.range is not None
)


def check_option(name: str, value: object) -> None:
    """Raises if an option is out of its range.

    Args:
        name: Name of an option that has a range in the table.
        value: Its value.

    Raises:
        ValueError: Names the option, its value and the range.
    """
    if not _RANGES[name].contains(value):
        raise _out_of_range(name, value)


def check_group_options(group: Mapping[str, Any]) -> None:
    """Raises if an option of a param group is out of its range.

    The schedule's options are left to :class:`~sgdr_fused.CosineWarmRestarts`.

    Args:
        group: A param group with all its options.

    Raises:
        ValueError: Names the option, its value and the range.
    """
    for name, (contains, _) in _RANGES_OF_GROUP:
        if not contains(group[name]):
            raise _out_of_range(name, group[name])
    momentum, dampening = group["momentum"], group["dampening"]
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"but got momentum={momentum}, dampening={dampening}"
        )
    if group["stochastic_rounding"] and group["master_weights"]:
        raise ValueError(
            "stochastic_rounding=True replaces the float32 copies that master_weights=True keeps; "
            "set one of the two"
        )


def checked_clipping(max_grad_norm: float | None, skip_nonfinite: bool) -> Clipping:
    """The two options as one value.

    Raises:
        ValueError: ``max_grad_norm`` is out of its range.
    """
    check_option("max_grad_norm", max_grad_norm)
    return Clipping(max_grad_norm, bool(skip_nonfinite))


def _out_of_range(name: str, value: object) -> ValueError:
    label = "learning rate" if name == "lr" else f"{name} value"  # as torch.optim.SGD says
    return ValueError(f"Invalid {label}: {value!r}; {name} must be {_RANGES[name].words}")
