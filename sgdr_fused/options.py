"""The options of FusedSGDR: one table, from which every other list of options is derived."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sgdr_fused.schedule import RANGES
from sgdr_fused.values import (
    AT_LEAST_0,
    FINITE,
    FLAG,
    Range,
    choice,
    floats,
    integers,
    or_none,
    shown,
)

__all__ = [
    "GROUP_OPTIONS",
    "OPTIONS",
    "REQUIRED",
    "Backend",
    "Clipping",
    "Option",
    "Support",
    "check_group_options",
    "checked_clipping",
    "plain_option",
    "plain_options",
    "refuse_options_of_all_groups",
]

Backend = Literal["auto", "native", "reference"]


class _Required:
    def __repr__(self) -> str:
        return "required"  # as the signature of FusedSGDR shows it


REQUIRED: Any = _Required()
"""Stands in the table where an option has no default."""


class Support(Enum):
    """How the pair of torch.optim.SGD and its scheduler, or the registered op, takes an option."""

    BY_NAME = "under the same name, with the same meaning"
    CONVERTED = "under another name or in another unit"
    DEFAULT_ONLY = "not at all: it cannot do what another value than the default asks for"
    NOT_NEEDED = "not at all, and it does not need to"


class Option(NamedTuple):
    """One option, a row of the table.

    Attributes:
        name: The argument of FusedSGDR and, if ``per_group``, the key in a param group.
        default: Default of the argument, or :data:`REQUIRED`.
        pair: How the pair takes it.
        op: How ``torch.ops.sgdr_fused.fused_step_`` takes it.
        range: Its values.
        per_group: Whether each param group has a value of its own.
    """

    name: str
    default: Any
    pair: Support
    op: Support
    range: Range
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

_NORM = floats("a float > 0, or inf", lambda value: value > 0)
_DECAY = floats("a float in [0, 1)", lambda value: 0 <= value < 1)
_SWA = choice("swa")


def _to_ema_decay(value: Any) -> Any:
    if callable(value):
        return value
    return (_SWA if isinstance(value, str) else _DECAY).convert(value)


_EMA_DECAY = Range(
    _to_ema_decay,
    lambda value: callable(value) or value == "swa" or _DECAY.contains(value),
    'a float in [0, 1), "swa", or a function of the number of applied steps',
)
_MOMENTUM_DTYPE = Range(
    lambda value: value,
    lambda value: isinstance(value, torch.dtype) and value in _MOMENTUM_DTYPES,
    f"one of {', '.join(map(str, _MOMENTUM_DTYPES))}",
)
_SEED = integers(0, 2**64 - 1, "an integer from 0 to 2**64 - 1")

_BY_NAME, _CONVERTED = Support.BY_NAME, Support.CONVERTED
_DEFAULT_ONLY, _NOT_NEEDED = Support.DEFAULT_ONLY, Support.NOT_NEEDED

# In the order of FusedSGDR's arguments.
OPTIONS = (
    # name, default, pair, op, range
    Option("lr", 1e-3, _BY_NAME, _CONVERTED, RANGES["lr"]),
    Option("momentum", 0, _BY_NAME, _BY_NAME, AT_LEAST_0),
    Option("dampening", 0, _BY_NAME, _BY_NAME, FINITE),
    Option("weight_decay", 0, _BY_NAME, _BY_NAME, AT_LEAST_0),
    Option("nesterov", False, _BY_NAME, _BY_NAME, FLAG),
    Option("T_0", REQUIRED, _CONVERTED, _CONVERTED, RANGES["T_0"]),
    Option("T_mult", 1, _CONVERTED, _BY_NAME, RANGES["T_mult"]),
    Option("eta_min", 0.0, _CONVERTED, _BY_NAME, RANGES["eta_min"]),
    Option("steps_per_epoch", 1, _CONVERTED, _CONVERTED, RANGES["steps_per_epoch"]),
    Option("anneal", "step", _CONVERTED, _CONVERTED, RANGES["anneal"]),
    # The pair needs no warm-up: to_pair() hands over after its end only.
    Option("warmup_steps", 0, _NOT_NEEDED, _BY_NAME, RANGES["warmup_steps"]),
    Option("warmup_start_lr", 0.0, _NOT_NEEDED, _BY_NAME, RANGES["warmup_start_lr"]),
    Option("cycle_decay", 1.0, _DEFAULT_ONLY, _BY_NAME, RANGES["cycle_decay"]),
    Option("n_cycles", None, _DEFAULT_ONLY, _BY_NAME, RANGES["n_cycles"]),
    Option("reset_momentum", False, _DEFAULT_ONLY, _BY_NAME, FLAG),
    Option("maximize", False, _BY_NAME, _BY_NAME, FLAG),
    Option("decoupled_weight_decay", False, _DEFAULT_ONLY, _BY_NAME, FLAG),
    Option("max_grad_norm", None, _DEFAULT_ONLY, _DEFAULT_ONLY, or_none(_NORM), per_group=False),
    Option("skip_nonfinite", False, _DEFAULT_ONLY, _DEFAULT_ONLY, FLAG, per_group=False),
    Option("ema_decay", None, _DEFAULT_ONLY, _DEFAULT_ONLY, or_none(_EMA_DECAY)),
    Option("momentum_dtype", None, _DEFAULT_ONLY, _DEFAULT_ONLY, or_none(_MOMENTUM_DTYPE)),
    Option("stochastic_rounding", False, _DEFAULT_ONLY, _DEFAULT_ONLY, FLAG),
    Option("master_weights", False, _DEFAULT_ONLY, _DEFAULT_ONLY, FLAG),
    # Only stochastic rounding draws random numbers.
    Option("seed", 0, _NOT_NEEDED, _NOT_NEEDED, _SEED),
    Option(
        "backend", "auto", _NOT_NEEDED, _NOT_NEEDED, choice(*get_args(Backend)), per_group=False
    ),
)

GROUP_OPTIONS = tuple(option for option in OPTIONS if option.per_group)

_RANGES = {option.name: option.range for option in OPTIONS}


def _count(least: int, words: str) -> Range:
    return integers(least, 2**62, f"{words}; call seek() to set the schedule's position")


# The entries that a GPU keeps, where tensors stand for them.
_ON_GPU = {
    "lr": RANGES["lr"],
    "scheduled_lr": RANGES["lr"],
    "step": _count(0, "an integer from 0 to 2**62"),
    "cycle": _count(0, "an integer from 0 to 2**62"),
    "T_cur": _count(-(2**53), "an integer from -2**53 to 2**62"),
    "T_i": _count(1, "an integer from 1 to 2**62"),
    "skipped_steps": _count(0, "an integer from 0 to 2**62"),
}
_ENTRIES = {
    **_ON_GPU,
    **{option.name: option.range for option in GROUP_OPTIONS},
    "initial_lr": RANGES["lr"],
}


def plain_option(name: str, value: object) -> Any:
    """The value of an option as a plain Python value.

    Args:
        name: Name of the option.
        value: Its value; a NumPy number or a tensor of one element may stand for a number.

    Raises:
        ValueError: It is out of its range; the message names the option, its value and the range.
    """
    return _RANGES[name].plain(name, value)


def refuse_options_of_all_groups(group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises if a param group has an option of the whole optimizer with another value than that.

    A wrapper such as ZeroRedundancyOptimizer puts all its options into each group.

    Args:
        group: A param group.
        own: The optimizer's values of these options.

    Raises:
        ValueError: Names the option and its value.
    """
    for name, value in own.items():
        if name in group and group[name] != value:
            raise ValueError(
                f"a param group has {name}={shown(group[name])}, which is an option of the whole "
                f"optimizer; pass it to FusedSGDR(), or set optimizer.{name}"
            )


def plain_options(group: Mapping[str, Any], is_on_gpu: bool = False) -> dict[str, Any]:
    """The entries of a param group that are not plain Python values, as plain ones.

    Args:
        group: A param group with all its entries. It is not written.
        is_on_gpu: Whether tensors hold the group's LR and place in the schedule, as on a GPU. They
            stay, because reading one would synchronize.

    Returns:
        The entries to update the group with; empty if all values are plain.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """
    changes = {}
    for name, values in _ENTRIES.items():
        value = group[name]
        stays = is_on_gpu and name in _ON_GPU and isinstance(value, Tensor)
        if stays and value.device.type != "cpu" and value.numel() == 1:
            continue
        plain = values.plain(name, value)
        if plain is not value and not stays:
            changes[name] = plain
    return changes


def check_group_options(group: Mapping[str, Any]) -> None:
    """Raises if options of a param group exclude each other.

    Args:
        group: A param group with all its options, as plain values.

    Raises:
        ValueError: Names the options and their values.
    """
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
        ValueError: One is out of its range.
    """
    return Clipping(
        plain_option("max_grad_norm", max_grad_norm),
        plain_option("skip_nonfinite", skip_nonfinite),
    )
