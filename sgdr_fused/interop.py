"""Conversion from and to the pair of torch.optim.SGD and CosineAnnealingWarmRestarts.

The scheduler may also be a SequentialLR of a LinearLR, as warm-up, and that scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, SequentialLR

from sgdr_fused.groups import check_group, move_group, position_of
from sgdr_fused.options import GROUP_OPTIONS, Clipping, Support
from sgdr_fused.schedule import CosineWarmRestarts, Position

__all__ = ["arguments_of_pair", "continue_pair", "to_pair"]

# The options that torch.optim.SGD has.
_SHARED = tuple(option.name for option in GROUP_OPTIONS if option.pair is Support.BY_NAME)
# The options that the scheduler has once for all groups, in its own units.
_OF_SCHEDULER = tuple(option.name for option in GROUP_OPTIONS if option.pair is Support.CONVERTED)


def arguments_of_pair(
    sgd: torch.optim.SGD,
    scheduler: CosineAnnealingWarmRestarts | SequentialLR,
    steps_per_epoch: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pair's param groups and schedule, as arguments of FusedSGDR.

    Args:
        sgd: The optimizer.
        scheduler: Its scheduler.
        steps_per_epoch: Optimizer steps in one unit of the scheduler's ``T_0``.

    Raises:
        TypeError: The two are not such a pair.
        ValueError: The pair cannot be continued.
    """
    if type(sgd) is not torch.optim.SGD:
        raise TypeError(f"Expected sgd to be a torch.optim.SGD, but got {type(sgd).__name__}")
    warmup, cosine = _warmup_and_cosine(scheduler)
    if scheduler.optimizer is not sgd:
        raise ValueError("the scheduler belongs to another optimizer; pass the one it was made for")
    if any(group["differentiable"] for group in sgd.param_groups):
        raise ValueError("sgd has differentiable=True, which FusedSGDR does not support")
    names = ("params", "param_names", *_SHARED)
    groups = [
        {name: group[name] for name in names if name in group} | {"initial_lr": float(base_lr)}
        for group, base_lr in zip(sgd.param_groups, cosine.base_lrs, strict=True)
    ]
    schedule = {name: getattr(cosine, name) for name in ("T_0", "T_mult", "eta_min")}
    if warmup is not None:
        schedule["warmup_steps"] = warmup.total_iters * steps_per_epoch
        for group in groups:
            group["warmup_start_lr"] = group["initial_lr"] * warmup.start_factor
    return groups, schedule


def continue_pair(
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    sgd: torch.optim.SGD,
    scheduler: CosineAnnealingWarmRestarts | SequentialLR,
) -> None:
    """Puts a new FusedSGDR where the pair is: position, LR and momentum buffers.

    Args:
        param_groups: The new optimizer's, made from :func:`arguments_of_pair`.
        state: The new optimizer's.
        sgd: The optimizer to continue.
        scheduler: Its scheduler.

    Raises:
        ValueError: The scheduler's position has no counterpart, or ``lr`` is invalid.
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


def _warmup_and_cosine(
    scheduler: CosineAnnealingWarmRestarts | SequentialLR,
) -> tuple[LinearLR | None, CosineAnnealingWarmRestarts]:
    """The parts of a scheduler, checked."""
    if type(scheduler) is CosineAnnealingWarmRestarts:
        return None, scheduler
    if type(scheduler) is not SequentialLR:
        raise TypeError(
            "Expected scheduler to be a CosineAnnealingWarmRestarts, or a SequentialLR of LinearLR "
            f"and CosineAnnealingWarmRestarts, but got {type(scheduler).__name__}"
        )
    parts: list[Any] = scheduler._schedulers
    if [type(part) for part in parts] != [LinearLR, CosineAnnealingWarmRestarts]:
        raise TypeError(
            "Expected scheduler to be a SequentialLR of LinearLR and CosineAnnealingWarmRestarts, "
            f"but got one of {', '.join(type(part).__name__ for part in parts)}"
        )
    warmup, cosine = parts
    (milestone,) = scheduler._milestones
    if warmup.end_factor != 1 or warmup.total_iters != milestone:
        raise ValueError(
            f"the LinearLR has end_factor={warmup.end_factor} and total_iters={warmup.total_iters},"
            f" but a warm-up of FusedSGDR ends at the peak, end_factor=1, where the first cycle "
            f"begins, at milestones=[{milestone}]; "
            "construct a FusedSGDR with the warmup_steps and warmup_start_lr that come closest"
        )
    return warmup, cosine


def _position_of(
    scheduler: CosineAnnealingWarmRestarts | SequentialLR, steps_per_epoch: int
) -> Position:
    warmup, cosine = _warmup_and_cosine(scheduler)
    warmup_epochs = 0 if warmup is None else warmup.total_iters
    if scheduler.last_epoch < warmup_epochs:
        if steps_per_epoch != 1:
            raise ValueError(
                f"the scheduler is at epoch {scheduler.last_epoch} of a warm-up that rises once an "
                "epoch; a warm-up of FusedSGDR rises at each step, so call from_pair() from epoch "
                f"{warmup_epochs} on"
            )
        T_cur = scheduler.last_epoch - warmup_epochs
        return Position(scheduler.last_epoch, 0, T_cur, cosine.T_0)

    T_cur = cosine.T_cur * steps_per_epoch
    if abs(T_cur - round(T_cur)) > 1e-6:
        raise ValueError(
            f"the scheduler is at T_cur={cosine.T_cur}, which is not a whole number of steps at "
            f"steps_per_epoch={steps_per_epoch}; pass the number of optimizer steps in an epoch"
        )
    if cosine.T_mult == 1:
        cycle = int(cosine.last_epoch) // cosine.T_0
    else:
        cycle = 0
        while cosine.T_0 * cosine.T_mult**cycle < cosine.T_i:
            cycle += 1
    # Computed from the cycles, because cosine.last_epoch has lost the fraction of an epoch.
    cycles = CosineWarmRestarts(
        lr=1.0, T_0=cosine.T_0, T_mult=cosine.T_mult, warmup_steps=warmup_epochs
    )
    step = cycles.cycle_start(cycle) * steps_per_epoch + round(T_cur)
    return Position(step, cycle, round(T_cur), cosine.T_i * steps_per_epoch)


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
