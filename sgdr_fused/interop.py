"""Conversion from and to the pair of torch.optim.SGD and CosineAnnealingWarmRestarts."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from sgdr_fused.groups import check_group, move_group, position_of
from sgdr_fused.options import GROUP_OPTIONS, Clipping, Support
from sgdr_fused.schedule import CosineWarmRestarts, Position

__all__ = ["arguments_of_pair", "continue_pair", "to_pair"]

# The options that torch.optim.SGD has.
_SHARED = tuple(option.name for option in GROUP_OPTIONS if option.pair is Support.BY_NAME)
# The options that the scheduler has once for all groups, in its own units.
_OF_SCHEDULER = tuple(option.name for option in GROUP_OPTIONS if option.pair is Support.CONVERTED)


def arguments_of_pair(
    sgd: torch.optim.SGD, scheduler: CosineAnnealingWarmRestarts
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pair's param groups and schedule, as arguments of FusedSGDR.

    Args:
        sgd: The optimizer.
        scheduler: Its scheduler.

    Raises:
        TypeError: The two are not such a pair.
        ValueError: The pair cannot be continued.
    """
    if type(sgd) is not torch.optim.SGD:
        raise TypeError(f"Expected sgd to be a torch.optim.SGD, but got {type(sgd).__name__}")
    if type(scheduler) is not CosineAnnealingWarmRestarts:
        raise TypeError(
            "Expected scheduler to be a CosineAnnealingWarmRestarts, "
            f"but got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not sgd:
        raise ValueError("the scheduler belongs to another optimizer; pass the one it was made for")
    if any(group["differentiable"] for group in sgd.param_groups):
        raise ValueError("sgd has differentiable=True, which FusedSGDR does not support")
    names = ("params", "param_names", *_SHARED)
    groups = [
        {name: group[name] for name in names if name in group} | {"initial_lr": float(base_lr)}
        for group, base_lr in zip(sgd.param_groups, scheduler.base_lrs, strict=True)
    ]
    schedule = {name: getattr(scheduler, name) for name in ("T_0", "T_mult", "eta_min")}
    return groups, schedule


def continue_pair(
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    sgd: torch.optim.SGD,
    scheduler: CosineAnnealingWarmRestarts,
) -> None:
    """Puts a new FusedSGDR where the pair is: position, LR and momentum buffers.

    Args:
        param_groups: The new optimizer's, made from :func:`arguments_of_pair`.
        state: The new optimizer's.
        sgd: The optimizer to continue.
        scheduler: Its scheduler.

    Raises:
        ValueError: The scheduler's position is not a whole number of steps, or ``lr`` is invalid.
    """
    position = _position_of(scheduler, param_groups[0]["steps_per_epoch"])
    for own, group in zip(param_groups, sgd.param_groups, strict=True):
        move_group(own, position)
        own["lr"] = group["lr"]
        own.update(check_group(own))
        for param in group["params"]:
            buffer = sgd.state.get(param, {}).get("momentum_buffer")
            if buffer is not None:
                state[param]["momentum_buffer"] = buffer


def _position_of(scheduler: CosineAnnealingWarmRestarts, steps_per_epoch: int) -> Position:
    T_cur = scheduler.T_cur * steps_per_epoch
    if abs(T_cur - round(T_cur)) > 1e-6:
        raise ValueError(
            f"the scheduler is at T_cur={scheduler.T_cur}, which is not a whole number of steps at "
            f"steps_per_epoch={steps_per_epoch}; pass the number of optimizer steps in an epoch"
        )
    if scheduler.T_mult == 1:
        cycle = int(scheduler.last_epoch) // scheduler.T_0
    else:
        cycle = 0
        while scheduler.T_0 * scheduler.T_mult**cycle < scheduler.T_i:
            cycle += 1
    # Computed from the cycles, because scheduler.last_epoch has lost the fraction of an epoch.
    before = sum(scheduler.T_0 * scheduler.T_mult**i for i in range(cycle)) * steps_per_epoch
    return Position(before + round(T_cur), cycle, round(T_cur), scheduler.T_i * steps_per_epoch)


def to_pair(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any], clipping: Clipping
) -> tuple[torch.optim.SGD, CosineAnnealingWarmRestarts]:
    """The pair that continues a FusedSGDR; see :meth:`~sgdr_fused.FusedSGDR.to_pair`.

    Args:
        groups: The optimizer's param groups, with numbers.
        state: The optimizer's; the pair gets the same momentum buffers.
        clipping: The options of the whole optimizer.

    Raises:
        ValueError: An option has no counterpart in the pair; the message says which.
    """
    for name, value in clipping._asdict().items():
        if value:
            raise ValueError(
                f"the optimizer has {name}={value!r}, for which the pair has no counterpart; "
                "unset it first"
            )
    first = groups[0]
    for i, group in enumerate(groups):
        _check_expressible(group, first, i)

    # The scheduler counts calls of scheduler.step().
    epoch = first["steps_per_epoch"]
    per_call = epoch if first["anneal"] == "epoch" else 1
    position = position_of(first)
    names = ("params", "param_names", *_SHARED, "initial_lr")
    sgd = torch.optim.SGD([{name: g[name] for name in names if name in g} for g in groups])
    lrs = [group["lr"] for group in groups]
    scheduler = CosineAnnealingWarmRestarts(
        sgd,
        T_0=first["T_0"] * epoch // per_call,
        T_mult=int(first["T_mult"]),
        eta_min=first["eta_min"],
    )
    scheduler.load_state_dict(
        {
            "last_epoch": position.step // per_call,
            "T_cur": position.T_cur // per_call,
            "T_i": position.T_i // per_call,
            "_last_lr": lrs,
        }
    )
    for group, lr in zip(sgd.param_groups, lrs, strict=True):
        group["lr"] = lr
    for param, of_param in state.items():
        if "momentum_buffer" in of_param:
            sgd.state[param]["momentum_buffer"] = of_param["momentum_buffer"]
    return sgd, scheduler


def _check_expressible(group: dict[str, Any], first: dict[str, Any], index: int) -> None:
    schedule = CosineWarmRestarts.of_group(group)
    position = position_of(group)
    expressible = {
        option.name: option.default
        for option in GROUP_OPTIONS
        if option.pair is Support.DEFAULT_ONLY
    }
    if group["weight_decay"] == 0:
        del expressible["decoupled_weight_decay"]
    expressible["T_mult"] = int(schedule.T_mult)
    for name, value in expressible.items():
        if group[name] != value:
            raise ValueError(
                f"param_groups[{index}] has {name}={group[name]!r}, for which the pair has no "
                f"counterpart; set it to {value!r} first"
            )
    if position.T_cur < 0:
        raise ValueError(
            f"param_groups[{index}] is in its warm-up, for which the pair has no counterpart; "
            f"call to_pair() after step {schedule.warmup_steps}"
        )
    for name in (*_OF_SCHEDULER, *Position._fields):
        if group[name] != first[name]:
            raise ValueError(
                f"param_groups[{index}] has {name}={group[name]!r}, but param_groups[0] has "
                f"{first[name]!r}; the pair has one schedule for all groups"
            )
