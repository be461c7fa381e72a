"""The options of a param group: checked, and kept in step with its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.schedule import CosineWarmRestarts, Position, is_finite

__all__ = [
    "check_group",
    "drop_momentum",
    "is_unchanged",
    "move_group",
    "position_of",
    "sync_group",
]

_MOMENTUM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_group(group: Mapping[str, Any]) -> None:
    """Raises for an option that is out of its range.

    Args:
        group: A param group with all its options.

    Raises:
        ValueError: Names the option, its value and the range.
    """
    schedule = CosineWarmRestarts.of_group(group)
    lr, momentum, dampening = group["lr"], group["momentum"], group["dampening"]
    # A tensor is what a GPU keeps, see device_state.py; a look at it would wait for the GPU.
    if not isinstance(lr, Tensor) and (not is_finite(lr) or lr < 0):
        raise ValueError(f"Invalid learning rate: {lr!r}; lr must be a finite float >= 0")
    if not is_finite(momentum) or momentum < 0:
        raise ValueError(
            f"Invalid momentum value: {momentum!r}; momentum must be a finite float >= 0"
        )
    if not is_finite(dampening):
        raise ValueError(
            f"Invalid dampening value: {dampening!r}; dampening must be a finite float"
        )
    if not is_finite(group["weight_decay"]) or group["weight_decay"] < 0:
        raise ValueError(
            f"Invalid weight_decay value: {group['weight_decay']!r}; "
            "weight_decay must be a finite float >= 0"
        )
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"but got momentum={momentum}, dampening={dampening}"
        )
    _check_averaging_and_precision(group)
    places = (("step", 0), ("cycle", 0), ("T_cur", -math.inf), ("T_i", 1), ("skipped_steps", 0))
    for name, least in places:
        if isinstance(group[name], Tensor):
            continue
        if type(group[name]) is not int or group[name] < least:
            raise ValueError(
                f"{name}={group[name]!r} is no place in a schedule; call seek() to set it"
            )
    if not isinstance(group["T_cur"], Tensor) and group["T_cur"] < -schedule.warmup_steps:
        raise ValueError(
            f"warmup_steps={schedule.warmup_steps} is less than the {-group['T_cur']} steps "
            "of warm-up that are still to run; call seek() to leave the warm-up"
        )


def _check_averaging_and_precision(group: Mapping[str, Any]) -> None:
    ema_decay, seed = group["ema_decay"], group["seed"]
    if not (
        ema_decay is None or ema_decay == "swa" or (is_finite(ema_decay) and 0 <= ema_decay < 1)
    ):
        raise ValueError(
            f"Invalid ema_decay value: {ema_decay!r}; ema_decay must be None, a float "
            'in [0, 1), or "swa"'
        )
    if group["momentum_dtype"] not in (None, *_MOMENTUM_DTYPES):
        raise ValueError(
            f"Invalid momentum_dtype value: {group['momentum_dtype']!r}; momentum_dtype must be "
            f"None or one of {', '.join(map(str, _MOMENTUM_DTYPES))}"
        )
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed value: {seed!r}; seed must be an int from 0 to 2**64 - 1")
    if group["stochastic_rounding"] and group["master_weights"]:
        raise ValueError(
            "stochastic_rounding=True does without the float32 copies that master_weights=True "
            "keeps; set one of the two"
        )


def position_of(group: Mapping[str, Any]) -> Position:
    """Where a group's schedule stands, as numbers."""
    return Position(*(_number(group[name]) for name in Position._fields))


def move_group(group: MutableMapping[str, Any], position: Position) -> None:
    """Sets a group's schedule to a position, and its LR to the LR there."""
    group.update(position._asdict(), lr=CosineWarmRestarts.of_group(group).lr_of(position))


def is_unchanged(group: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a group holds the very objects that it held before."""
    return group.keys() == before.keys() and all(group[key] is before[key] for key in group)


def drop_momentum(group: Mapping[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    """Makes the next step of each parameter its first, as after a restart with reset_momentum."""
    for param in group["params"]:
        if param in state:
            state[param].pop("momentum_buffer", None)


def sync_group(group: MutableMapping[str, Any], lr_before: object) -> None:
    """Takes a change of a group's options over; called before the first step that sees it.

    Args:
        group: A param group.
        lr_before: The object that ``lr`` was after the last step; None before the first. If it
            still is, the LR is computed anew, for the schedule may have changed; if not, it was
            set by hand and holds for the next step.

    Raises:
        ValueError: An option is out of its range.
    """
    if isinstance(group["lr"], Tensor):
        group["lr"] = float(group["lr"])
    check_group(group)
    if group["lr"] is lr_before:
        move_group(group, position_of(group))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
