"""What ``torch.distributed.checkpoint`` needs of the optimizer's state: that it is complete.

It loads those entries that it finds in a state_dict made beforehand, and wants each of them in the
file. But a momentum buffer comes with a parameter's first step and goes with ``reset_momentum``, an
average comes with the end of a cycle. So what its ``get_optimizer_state_dict`` is given has a
tensor for each of them: where there is nothing to be saved it is blank, all NaN, and is left out
again when it is loaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.tensors import dtypes_of_state, named_params

__all__ = ["completed", "is_at_work", "is_initialisation", "name_missing", "without_blanks"]


def is_at_work() -> bool:
    """Whether ``torch.distributed.checkpoint.state_dict`` is among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False


def is_initialisation(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step is one that only wants the state to exist.

    ``torch.distributed.checkpoint`` takes one with gradients of zero and an LR of 0, when it finds
    no state. It must not move the schedule, and must not be a parameter's first step.

    Args:
        param_groups: The optimizer's.
    """
    lr = param_groups[0]["lr"]
    # One on a GPU is not by its hand, and a look at it would wait for the GPU.
    is_on_gpu = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return not is_on_gpu and lr == 0 and is_at_work()


def name_missing(
    param_groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, Any]
) -> None:
    """Gives the state a None under each name that it will have something under.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's. None is the same to a step as no entry.
    """
    for _, group, param in named_params(param_groups):
        if param.requires_grad or param in state:
            of_param = state.setdefault(param, {})
            for name in (*dtypes_of_state(group, param), *_counts(group)):
                of_param.setdefault(name, None)


def completed(
    param_groups: Sequence[Mapping[str, Any]], packed_state: Mapping[Any, Mapping[str, Any]]
) -> dict[Any, Any]:
    """The state with blank tensors in place of None.

    Args:
        param_groups: The optimizer's.
        packed_state: As in a state_dict, by the parameters' indices.
    """
    complete: dict[Any, Any] = dict(packed_state)
    for index, (_, group, param) in enumerate(named_params(param_groups)):
        if index not in complete:
            continue
        complete[index] = of_param = dict(complete[index])
        for role, dtype in dtypes_of_state(group, param).items():
            if of_param.get(role) is None:
                of_param[role] = torch.full_like(param.detach(), math.nan, dtype=dtype)
        for name in _counts(group):
            of_param[name] = of_param.get(name) or 0
    return complete


def without_blanks(of_param: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's loaded state without the tensors that hold nothing.

    Args:
        of_param: Names and values.
    """
    kept = {name: value for name, value in of_param.items() if not _is_blank(value)}
    if "ema" not in kept:
        kept.pop("n_averaged", None)
    return kept


def _counts(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("n_averaged",) if group["ema_decay"] == "swa" else ()


def _is_blank(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    # Of all ranks' shards: one without elements says nothing.
    count = value.isnan().sum()
    return int(count.full_tensor() if hasattr(count, "full_tensor") else count) == value.numel()
