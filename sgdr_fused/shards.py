"""DTensors: the local shard behind one, where it is placed, and sums over its ranks; FSDP1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "find_flat_shard",
    "local_tensor",
    "place_in_words",
    "placed_like",
    "placement_of",
    "shard_axes",
    "sum_over_shards",
]


def placement_of(tensor: Tensor) -> Any:
    """The device mesh and the placements of a DTensor; None for a plain tensor."""
    placements = getattr(tensor, "placements", None)
    return placements and (tensor.device_mesh, placements)  # type: ignore[attr-defined]


def place_in_words(tensor: Tensor) -> str:
    """The same for an error message."""
    placement = placement_of(tensor)
    return f"{placement[1]} on {placement[0]}" if placement else "a plain tensor"


def local_tensor(tensor: Tensor, param: Tensor) -> Tensor | None:
    """The plain tensor behind a parameter, or behind a gradient or state tensor of it.

    Args:
        tensor: Any tensor. A DTensor gives its local shard; a gradient is redistributed to the
            parameter's placements first.
        param: The parameter that it belongs to.

    Returns:
        A tensor that shares the shard's memory. None for an unknown tensor subclass, and for a
        state tensor that is not placed like the parameter and so cannot be updated in place.
    """
    if not hasattr(tensor, "to_local"):
        return tensor if type(tensor) in (Tensor, torch.nn.Parameter) else None
    if placement_of(tensor) != placement_of(param):
        if tensor is not param.grad or placement_of(param) is None:
            return None
        tensor = tensor.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    local: Tensor = tensor.to_local()
    # It may be the result of a collective that still runs.
    return local.wait() if hasattr(local, "wait") else local


def placed_like(param: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's shape, sharded as the parameter is.

    Args:
        param: The parameter.
        tensor: A DTensor in any placements, or a plain tensor, which every rank has in full.
    """
    if placement_of(tensor) == placement_of(param):
        return tensor
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if not hasattr(param, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_axes(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The ranks over which a tensor is sharded.

    Args:
        tensor: Any tensor.

    Returns:
        The device mesh of a DTensor and the mesh dimensions that shard it; None if this rank has
        the whole tensor.
    """
    placements = getattr(tensor, "placements", ())
    axes = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return (tensor.device_mesh, axes) if axes else None  # type: ignore[attr-defined]


def sum_over_shards(sum_of_squares: Tensor, axes: tuple[Any, tuple[int, ...]]) -> None:
    """Adds the other ranks' sums, in place.

    Args:
        sum_of_squares: This rank's sum, of shape ().
        axes: Result of :func:`shard_axes`.
    """
    mesh, dimensions = axes
    for dimension in dimensions:
        torch.distributed.all_reduce(sum_of_squares, group=mesh.get_group(dimension))


def find_flat_shard(params: Iterable[Tensor]) -> Tensor | None:
    """The first parameter that FullyShardedDataParallel (FSDP1) has sharded; None without one.

    FSDP1's parameters are plain tensors, which do not tell over which ranks they are sharded.

    Args:
        params: Parameters of an optimizer. With ``use_orig_params=True`` those of an FSDP unit
            count as whole, as with ``NO_SHARD``, if one of them has other than one dimension.
    """
    units: defaultdict[int, list[Tensor]] = defaultdict(list)
    for param in params:
        if not getattr(param, "_fsdp_flattened", False):
            continue
        if not getattr(param, "_is_flat_param", False):
            units[param.untyped_storage().data_ptr()].append(param)
        elif param._sharded_size != param._unpadded_unsharded_size:  # type: ignore[attr-defined]
            return param
    return next((unit[0] for unit in units.values() if all(p.dim() == 1 for p in unit)), None)
