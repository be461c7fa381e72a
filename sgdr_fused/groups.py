"""A param group: its options and its place in the schedule, checked and kept in step."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sgdr_fused.options import check_group_options
from sgdr_fused.schedule import CosineWarmRestarts, Position

__all__ = [
    "check_group",
    "complete_new_group",
    "drop_momentum",
    "is_unchanged",
    "move_group",
    "position_of",
    "sync_group",
    "with_unique_params",
]

_LEAST = {"step": 0, "cycle": 0, "T_cur": -math.inf, "T_i": 1, "skipped_steps": 0}


def check_group(group: Mapping[str, Any]) -> None:
    """Raises if an option, or the place in the schedule, is not valid.

    Args:
        group: A param group with all its entries.

    Raises:
        ValueError: Names the entry, its value and what to do.
    """
    schedule = CosineWarmRestarts.of_group(group)
    check_group_options(group)
    for name, least in _LEAST.items():
        value = group[name]
        # On a GPU these are tensors, and reading one would synchronize.
        if not isinstance(value, Tensor) and (type(value) is not int or value < least):
            raise ValueError(
                f"Invalid {name} value in a param group: {value!r}; call seek() to set the "
                "schedule's position"
            )
    T_cur = group["T_cur"]
    if not isinstance(T_cur, Tensor) and T_cur < -schedule.warmup_steps:
        raise ValueError(
            f"warmup_steps={schedule.warmup_steps} is less than the {-T_cur} steps of warm-up "
            "that remain; call seek() to leave the warm-up"
        )


def with_unique_params(param_group: dict[str, Any]) -> dict[str, Any]:
    """A group that is to be added, its parameters as a list.

    Args:
        param_group: Argument of ``add_param_group()``.

    Raises:
        ValueError: A parameter is listed twice.
    """
    if not isinstance(param_group, dict) or isinstance(
        param_group.get("params"), (Tensor, set, type(None))
    ):
        return param_group  # torch accepts it or raises its own error
    params = list(param_group["params"])
    index_of: dict[int, int] = {}
    for i, entry in enumerate(params):
        first = index_of.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), i)
        if first != i:
            raise ValueError(
                "optimizer contains a parameter group with duplicate parameters: "
                f"params[{first}] and params[{i}] are one tensor; list it once"
            )
    return param_group | {"params": params}


def complete_new_group(param_groups: Sequence[dict[str, Any]]) -> None:
    """Checks the last group, and puts its schedule at the step that the others have reached.

    Args:
        param_groups: The optimizer's; the last was just added.

    Raises:
        ValueError: An option is out of its range, or the parameters are on several devices.
        TypeError: ``lr`` is not a number.
    """
    group = param_groups[-1]
    _check_devices(group["params"], len(param_groups) - 1)
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    group["lr"] = float(lr)
    group["initial_lr"] = float(group.get("initial_lr", lr))
    group.setdefault("skipped_steps", 0)
    move_group(group, _joining_position(group, param_groups[0]))
    check_group(group)


def position_of(group: Mapping[str, Any]) -> Position:
    """A group's place in its schedule, as numbers; synchronizes if it is on a GPU."""
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
    """Applies changes of a group's options; called before the first step that sees them.

    Args:
        group: A param group.
        lr_before: The object that ``lr`` was after the last step; None before the first. If it is
            still that object, the LR is computed anew, because the schedule may have changed.
            Otherwise the user has set it, and it holds for the next step.

    Raises:
        ValueError: An option is out of its range.
    """
    if isinstance(group["lr"], Tensor):
        group["lr"] = float(group["lr"])
    check_group(group)
    if group["lr"] is lr_before:
        move_group(group, position_of(group))


def _joining_position(group: dict[str, Any], first: dict[str, Any]) -> Position:
    schedule = CosineWarmRestarts.of_group(group)
    if first is group:
        return schedule.position(0)
    # A group with the same cycles joins the first group's cycle, even after a restart() call.
    if (
        replace(CosineWarmRestarts.of_group(first), lr=schedule.lr, eta_min=schedule.eta_min)
        == schedule
    ):
        return position_of(first)
    return schedule.position(position_of(first).step)


def _check_devices(params: list[Tensor], group: int) -> None:
    for i, param in enumerate(params):
        if param.device != params[0].device:
            raise ValueError(
                f'param_groups[{group}]["params"][{i}] is on {param.device}, but params[0] is on '
                f"{params[0].device}; give each device a param group of its own"
            )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
