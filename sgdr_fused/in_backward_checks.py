"""Refusals of step_in_backward(): where an update within backward() would be a wrong one."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sgdr_fused.options import Clipping
from sgdr_fused.shards import local_tensor
from sgdr_fused.tensors import named_params

__all__ = [
    "name_of",
    "refuse_clipping",
    "refuse_flat_params",
    "refuse_gradients",
    "refuse_late_changes",
    "refuse_scaled_step",
    "refuse_shared_memory",
]

_NO_SCALER = (
    "step_in_backward() cannot be used with a GradScaler, which decides about a step when all "
    "gradients are there, and whose factor the updates within backward() would not divide out; "
    "train in bfloat16, which needs no scaler, or remove() the handle"
)
_NO_DDP = (
    "step_in_backward() cannot be used under DistributedDataParallel, which averages the gradients "
    "over the ranks only after the updates within backward(), so the ranks would diverge. It keeps "
    "all gradients in its buckets anyway: leave the updates to step(), with "
    "gradient_as_bucket_view=True to save a copy of the gradients, or shard with fully_shard()"
)


def name_of(param_groups: Sequence[Mapping[str, Any]], param: Tensor) -> str:
    """A parameter's name for error messages."""
    return next(name for name, _, other in named_params(param_groups) if other is param)


def refuse_clipping(clipping: Clipping) -> None:
    """Raises for an option that needs all gradients before the first update.

    Raises:
        ValueError: ``max_grad_norm`` or ``skip_nonfinite`` is set.
    """
    for name, value in clipping._asdict().items():
        if value:
            raise ValueError(
                f"{name}={value!r} needs all gradients before the first update, but "
                f"step_in_backward() updates as they arrive; unset {name}, or do not call "
                "step_in_backward()"
            )


def refuse_gradients(param_groups: Sequence[Mapping[str, Any]], params: Iterable[Tensor]) -> None:
    """Raises for a gradient that the next one would be added to.

    Raises:
        RuntimeError: A parameter has a gradient.
    """
    for param in params:
        if param.grad is not None:
            raise RuntimeError(
                f"{name_of(param_groups, param)} has a gradient, to which the next backward() "
                "would add before it updates; call zero_grad() before step_in_backward()"
            )


def refuse_scaled_step(optimizer: Optimizer) -> None:
    """Raises in a step that a GradScaler takes.

    Raises:
        RuntimeError: A GradScaler has set its attributes.
    """
    if "found_inf" in vars(optimizer):
        raise RuntimeError(_NO_SCALER)


def refuse_flat_params(param_groups: Sequence[Mapping[str, Any]], params: Iterable[Tensor]) -> None:
    """Raises for FSDP1's flat parameters, whose gradients are summed over ranks after the hooks.

    Raises:
        RuntimeError: A parameter is one.
    """
    for param in params:
        if getattr(param, "_is_flat_param", False):
            raise RuntimeError(
                f"{name_of(param_groups, param)} is a flat parameter of FullyShardedDataParallel, "
                "which sums gradients over the ranks only after the updates within backward(); "
                "shard the model with fully_shard(), or do not call step_in_backward()"
            )


def refuse_shared_memory(
    param_groups: Sequence[Mapping[str, Any]], params: Iterable[Tensor]
) -> None:
    """Raises for two parameters that lie in the same memory.

    The update of one changes the other, which backward() may still need as it was in forward().
    Autograd does not notice where memory is shared by ``.data``.

    Raises:
        RuntimeError: Names the two.
    """
    extents = ((_extent(param), param) for param in params)
    in_order = sorted(((e, p) for e, p in extents if e), key=lambda item: item[0])
    for (before, param), (after, other) in pairwise(in_order):
        if before.device == after.device and after.start < before.end:
            raise RuntimeError(
                f"{name_of(param_groups, param)} and {name_of(param_groups, other)} share memory, "
                "so step_in_backward() would change one while backward() still needs it for the "
                "other; tie them by using one Parameter in both places, whose gradients are then "
                "added up, or do not call step_in_backward()"
            )


class _Extent(NamedTuple):
    """Device, first address and end of a parameter's elements."""

    device: str
    start: int
    end: int


def _extent(param: Tensor) -> _Extent | None:
    local = local_tensor(param, param)
    if local is None or local.numel() == 0 or local.is_meta:
        return None
    steps = ((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    start = local.data_ptr()
    return _Extent(str(local.device), start, start + (sum(steps) + 1) * local.itemsize)


def refuse_late_changes(params: Iterable[Tensor]) -> None:
    """Raises if a gradient that a hook sees is not yet the one to update by.

    A backward() does not tell which GradScaler or DistributedDataParallel it belongs to, so all
    that are alive are looked at. To find them takes some milliseconds.

    Raises:
        RuntimeError: A GradScaler has scaled its first loss, or DistributedDataParallel holds a
            parameter.
    """
    ids = set(map(id, params))
    reason = _reason_against(ids)
    if reason:
        # It may be garbage, of an earlier run in a notebook.
        gc.collect()
        reason = _reason_against(ids)
    if reason:
        raise RuntimeError(reason)


def _reason_against(ids: set[int]) -> str:
    for found in _instances(GradScaler, DistributedDataParallel):
        if isinstance(found, GradScaler):
            if _has_just_begun(found):
                return _NO_SCALER + " (one that an earlier run left behind counts too: delete it)"
        elif _reduces_any(found, ids):
            return _NO_DDP
    return ""


def _instances(*classes: type) -> list[Any]:
    """All live objects of classes and their subclasses; each refers to its class."""
    wanted = _with_subclasses(classes)
    return [found for found in gc.get_referrers(*wanted) if type(found) in wanted]


def _with_subclasses(classes: Iterable[type]) -> set[type]:
    return set(classes).union(*(_with_subclasses(cls.__subclasses__()) for cls in classes))


def _has_just_begun(scaler: GradScaler) -> bool:
    """Whether it has scaled a loss, and was not updated since it was made or loaded."""
    return (
        scaler.is_enabled()
        and scaler._scale is not None
        and scaler.get_scale() == scaler._init_scale
        and scaler._get_growth_tracker() == scaler._init_growth_tracker
    )


def _reduces_any(model: DistributedDataParallel, ids: set[int]) -> bool:
    return any(
        id(param) in ids
        for name, param in model.module.named_parameters()
        if name not in model.parameters_to_ignore
    )
