"""To and from the pair of torch.optim.SGD and CosineAnnealingWarmRestarts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from sgdr_fused.groups import check_group, position_of
from sgdr_fused.schedule import CosineWarmRestarts, Position

if TYPE_CHECKING:
    from sgdr_fused.optimizer import FusedSGDR

__all__ = ["from_pair", "to_pair"]

# The options that both sides know under one name.
_SHARED = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def from_pair(
    cls: type[FusedSGDR],
    sgd: torch.optim.SGD,
    scheduler: CosineAnnealingWarmRestarts,
    *,
    steps_per_epoch: int,
    **options: Any,
) -> FusedSGDR:
    """See :meth:`FusedSGDR.from_pair`."""
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
        raise ValueError("sgd has differentiable=True, which FusedSGDR cannot do")

    names = ("params", "param_names", *_SHARED)
    groups = [
        {name: group[name] for name in names if name in group} | {"initial_lr": float(base_lr)}
        for group, base_lr in zip(sgd.param_groups, scheduler.base_lrs, strict=True)
    ]
    optimizer = cls(
        groups,
        T_0=scheduler.T_0,
        T_mult=scheduler.T_mult,
        eta_min=scheduler.eta_min,
        steps_per_epoch=steps_per_epoch,
        **options,
    )
    for own, group in zip(optimizer.param_groups, sgd.param_groups, strict=True):
        own.update(_position_of(scheduler, steps_per_epoch)._asdict(), lr=float(group["lr"]))
        check_group(own)
        for param in group["params"]:
            buffer = sgd.state.get(param, {}).get("momentum_buffer")
            if buffer is not None:
                optimizer.state[param]["momentum_buffer"] = buffer
    optimizer._sync()
    return optimizer


def _position_of(scheduler: CosineAnnealingWarmRestarts, steps_per_epoch: int) -> Position:
    T_cur = scheduler.T_cur * steps_per_epoch
    if abs(T_cur - round(T_cur)) > 1e-6:
        raise ValueError(
            f"the scheduler stands at T_cur={scheduler.T_cur}, which is not a whole "
            "number of steps "
            f"at steps_per_epoch={steps_per_epoch}; pass the number of optimizer steps in an epoch"
        )
    if scheduler.T_mult == 1:
        cycle = int(scheduler.last_epoch) // scheduler.T_0
    else:
        cycle = 0
        while scheduler.T_0 * scheduler.T_mult**cycle < scheduler.T_i:
            cycle += 1
    # The steps of the cycles before this one; scheduler.last_epoch has lost the fraction of an
    # epoch.
    before = sum(scheduler.T_0 * scheduler.T_mult**i for i in range(cycle)) * steps_per_epoch
    return Position(before + round(T_cur), cycle, round(T_cur), scheduler.T_i * steps_per_epoch)


def to_pair(optimizer: FusedSGDR) -> tuple[torch.optim.SGD, CosineAnnealingWarmRestarts]:
    """See :meth:`FusedSGDR.to_pair`."""
    for name in ("max_grad_norm", "skip_nonfinite"):
        if getattr(optimizer, name):
            raise ValueError(
                f"the optimizer has {name}={getattr(optimizer, name)!r}, for which the pair has no "
                "counterpart; unset it first"
            )
    groups, state = optimizer._on_host()
    first = groups[0]
    for i, group in enumerate(groups):
        _check_expressible(group, first, i)

    # In the scheduler's unit: calls of scheduler.step().
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
    for name, wanted in (
        ("cycle_decay", 1),
        ("n_cycles", None),
        ("reset_momentum", False),
        ("decoupled_weight_decay", False),
        ("ema_decay", None),
        ("momentum_dtype", None),
        ("stochastic_rounding", False),
        ("master_weights", False),
        ("T_mult", int(schedule.T_mult)),
    ):
        if group[name] != wanted and (
            name != "decoupled_weight_decay" or group["weight_decay"] != 0
        ):
            raise ValueError(
                f"param_groups[{index}] has {name}={group[name]!r}, for which the pair "
                "has no counterpart; "
                f"set it to {wanted!r} first"
            )
    if position.T_cur < 0:
        raise ValueError(
            f"param_groups[{index}] is in its warm-up, for which the pair has no counterpart; "
            f"hand over after step {schedule.warmup_steps}"
        )
    for name in ("T_0", "T_mult", "eta_min", "steps_per_epoch", "anneal", *Position._fields):
        if group[name] != first[name]:
            raise ValueError(
                f"param_groups[{index}] has {name}={group[name]!r}, but "
                f"param_groups[0] has {first[name]!r}; "
                "the pair has one schedule for all groups"
            )
