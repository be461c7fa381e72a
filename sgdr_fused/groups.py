"""A param group: its options and its place in the schedule, checked and kept in step."""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, MutableMapping, Sequence, ValuesView
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.nn import ParameterList

from sgdr_fused.ema_schedule import evaluate_ema_decay
from sgdr_fused.misspelt import nearest_name
from sgdr_fused.options import GROUP_OPTIONS, OPTIONS, check_group_options, plain_options
from sgdr_fused.schedule import CosineWarmRestarts, Position
from sgdr_fused.values import INTEGER, shown

__all__ = [
    "advance_group",
    "as_list",
    "check_group",
    "check_groups",
    "complete_new_group",
    "drop_momentum",
    "index_of_group",
    "is_unchanged",
    "kept_on_success",
    "listed",
    "move_group",
    "position_of",
    "sync_group",
]

# What a group has besides its options.
_OWN_ENTRIES = ("params", "initial_lr", "scheduled_lr", "skipped_steps", *Position._fields)
_ENTRIES = frozenset((*_OWN_ENTRIES, *(option.name for option in GROUP_OPTIONS)))
# Wrappers may put these into each group.
_SHARED = tuple(option.name for option in OPTIONS if not option.per_group)


def check_groups(param_groups: Sequence[MutableMapping[str, Any]]) -> None:
    """Raises for what is no param group; makes each group's ``params`` a list.

    Args:
        param_groups: The optimizer's.

    Raises:
        TypeError: ``param_groups`` is no list, a group no dict, or its ``params`` no list of
            tensors. A generator has been listed all the same, because it can be only once.
        ValueError: A group lacks an entry, or has one whose name is nearly an option's.
    """
    if not isinstance(param_groups, list):
        raise TypeError(
            f"optimizer.param_groups is of type {type(param_groups).__name__}, but must be a list"
        )
    for i, group in enumerate(param_groups):
        if not isinstance(group, dict):
            raise TypeError(
                f"param_groups[{i}] is of type {type(group).__name__}, but must be a dict; add "
                "groups with add_param_group()"
            )
        missing = _ENTRIES - group.keys()
        if missing:
            raise ValueError(
                f"param_groups[{i}] has no {sorted(missing)[0]!r}; add groups with "
                "add_param_group()"
            )
        _refuse_misspelt(i, group)
        if type(group["params"]) is not list:
            group["params"] = _listed(f'param_groups[{i}]["params"]', group["params"])
        for j, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f'param_groups[{i}]["params"][{j}] is of type {type(param).__name__}, but '
                    "must be a tensor"
                )


def _refuse_misspelt(i: int, group: Mapping[str, Any]) -> None:
    """Raises for a name that is nearly an option's; other entries are the user's own."""
    for name in group.keys() - _ENTRIES:
        meant = _nearest_option(name)
        if meant is not None:
            raise ValueError(
                f"param_groups[{i}] has {name!r}, which is no option; did you mean {meant!r}?"
            )


@lru_cache
def _nearest_option(name: object) -> str | None:
    if name in _SHARED or not isinstance(name, str):
        return None
    return nearest_name(name, (*_SHARED, "initial_lr", *(option.name for option in GROUP_OPTIONS)))


def _listed(name: str, params: Any) -> list[Any]:
    # A tensor and an ndarray could be iterated, but over their rows, and a set in any order.
    if isinstance(params, (list, tuple, Iterator, KeysView, ValuesView, ParameterList)):
        return list(params)
    raise TypeError(
        f"{name} is of type {type(params).__name__}, but must be a list of tensors, or a tuple or "
        "generator of them"
    )


@contextmanager
def kept_on_success(param_groups: Sequence[MutableMapping[str, Any]]) -> Iterator[None]:
    """Puts the groups' entries back if the ``with`` block raises."""
    before = [(group, dict(group)) for group in param_groups]
    try:
        yield
    except BaseException:
        for group, entries in before:
            group.clear()
            group.update(entries)
        raise


def check_group(group: Mapping[str, Any], is_on_gpu: bool = False) -> dict[str, Any]:
    """Raises if an option, or the place in the schedule, is not valid.

    Args:
        group: A param group with all its entries. It is not written.
        is_on_gpu: As for :func:`~sgdr_fused.options.plain_options`.

    Returns:
        The entries that are not plain Python values, as plain ones, to update the group with.

    Raises:
        ValueError: Names the entry, its value and what to do.
    """
    changes = plain_options(group, is_on_gpu)
    plain = {**group, **changes}
    schedule = CosineWarmRestarts.of_group(plain)
    check_group_options(plain)
    T_cur = plain["T_cur"]
    if not isinstance(T_cur, Tensor) and T_cur < -schedule.warmup_steps:
        raise ValueError(
            f"warmup_steps={schedule.warmup_steps} is less than the {-T_cur} steps of warm-up "
            "that remain; call seek() to leave the warm-up"
        )
    return changes


def listed(param_group: object, index: int) -> Any:
    """A group that is to be added, its parameters as a list; the argument is not written.

    Args:
        param_group: Argument of ``add_param_group()``.
        index: The index that the group will have.

    Raises:
        ValueError: There are no parameters, or one is listed twice.
        TypeError: The parameters, or an entry of theirs, have a wrong type.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but is {_with_type(param_group)}")
    name = f'param_groups[{index}]["params"]'
    if "params" not in param_group:
        raise ValueError(f"{name} is missing; the group has {shown([*param_group])}")
    given = param_group["params"]
    if isinstance(given, set):
        return param_group  # torch says why it takes no set
    params = [given] if isinstance(given, Tensor) else as_list(name, given)
    index_of: dict[int, int] = {}
    for i, entry in enumerate(params):
        is_named = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        param = entry[1] if is_named else entry
        if not isinstance(param, Tensor):
            raise TypeError(
                f"{name}[{i}] must be a tensor or a pair of name and tensor, but is "
                + _with_type(entry)
            )
        first = index_of.setdefault(id(param), i)
        if first != i:
            raise ValueError(
                "optimizer contains a parameter group with duplicate parameters: "
                f"params[{first}] and params[{i}] are one tensor; list it once"
            )
    return param_group | {"params": params}


def as_list(name: str, values: Any) -> list[Any]:
    """What an iterable gives, as a list.

    Raises:
        TypeError: It is no iterable; the message names it.
    """
    try:
        iterator = iter(values)
    except TypeError as error:
        raise TypeError(
            f"{name} must be an iterable of tensors, but is {_with_type(values)}"
        ) from error
    return list(iterator)


def _with_type(value: object) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def complete_new_group(param_groups: Sequence[dict[str, Any]]) -> None:
    """Checks the last group, and puts its schedule at the step that the others have reached.

    A group of another FusedSGDR, which has a place in the schedule, keeps it, and its LR.

    Args:
        param_groups: The optimizer's; the last was just added.

    Raises:
        ValueError: An option is out of its range or misspelt, or the parameters are on several
            devices.
        TypeError: There is no ``T_0``.
    """
    group = param_groups[-1]
    _refuse_misspelt(len(param_groups) - 1, group)
    if "T_0" not in group:
        raise TypeError(
            "FusedSGDR needs T_0, the length of the first cycle: pass T_0=..., or set it in each "
            f"param group, of which param_groups[{len(param_groups) - 1}] has none"
        )
    _check_devices(group["params"], len(param_groups) - 1)
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but is {shown(lr)}")
    group.setdefault("initial_lr", lr)
    group.setdefault("skipped_steps", 0)
    has_place = all(name in group for name in Position._fields)
    if not has_place:
        group.update(Position(0, 0, 0, 1)._asdict())
    group.setdefault("scheduled_lr", lr)
    group.update(plain_options(group))
    if not has_place:
        move_group(group, _joining_position(group, param_groups[0]))
    group.update(check_group(group))
    evaluate_ema_decay(group)


def position_of(group: Mapping[str, Any]) -> Position:
    """A group's place in its schedule, as numbers; synchronizes if it is on a GPU."""
    return Position(*(_number(group[name]) for name in Position._fields))


def move_group(group: MutableMapping[str, Any], position: Position) -> None:
    """Sets a group's schedule to a position, and its LR to the LR there."""
    lr = CosineWarmRestarts.of_group(group).lr_of(position)
    group.update(position._asdict(), lr=lr, scheduled_lr=lr)


def advance_group(group: MutableMapping[str, Any]) -> bool:
    """Moves a group's schedule one step on.

    An LR that differs from the schedule's was set by hand. It holds until the schedule's next
    change: for one step, or with ``anneal="epoch"`` until the next epoch.

    Returns:
        Whether a cycle other than the first begins.
    """
    schedule = CosineWarmRestarts.of_group(group)
    position = schedule.advance(position_of(group))
    lr, was_set_by_hand = group["lr"], group["lr"] != group["scheduled_lr"]
    move_group(group, position)
    if was_set_by_hand and not schedule.changes_lr(position):
        group["lr"] = lr
    return schedule.is_restart(position)


def is_unchanged(group: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a group holds the very objects that it held before."""
    return group.keys() == before.keys() and all(group[key] is before[key] for key in group)


def index_of_group(param_groups: Sequence[Any], group: int) -> int:
    """The index of a param group, counted from the front.

    Args:
        param_groups: The optimizer's.
        group: The index as a user gives it, below zero from the end.

    Raises:
        ValueError: It is no integer.
        IndexError: There is no such group.
    """
    index: int = INTEGER.plain("group", group)
    if not -len(param_groups) <= index < len(param_groups):
        raise IndexError(
            f"group={index} is out of range: there are {len(param_groups)} param groups, numbered "
            f"from 0 to {len(param_groups) - 1}, or from -1 backwards"
        )
    return index % len(param_groups)


def drop_momentum(group: Mapping[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    """Makes the next step of each parameter its first, as after a restart with reset_momentum."""
    for param in group["params"]:
        if param in state:
            state[param].pop("momentum_buffer", None)


def sync_group(group: MutableMapping[str, Any]) -> None:
    """Applies changes of a group's options; called before the first step that sees them.

    The LR is computed anew, because the schedule may have changed, unless it was set by hand.

    Args:
        group: A param group.

    Raises:
        ValueError: An option is out of its range.
    """
    group.update(check_group(group))
    evaluate_ema_decay(group)
    if group["lr"] == group["scheduled_lr"]:
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
