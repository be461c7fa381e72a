"""The global norm of the gradients, and what is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["clip_coefficient", "norm_of", "shard_axes", "sum_of_squares", "sum_over_shards"]

# See Note [Sum of squares] in csrc/sgdr_math.h.
_CHUNK = 4096
_LANES = 128


def sum_of_squares(grads: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in float64 and in one order.

    Args:
        grads: Flat tensors of real numbers.

    Returns:
        A float64 tensor without dimensions, on the CPU.
    """
    chunks = [_sums_of_chunks(grad) for grad in grads if grad.numel() != 0]
    if not chunks:
        return torch.zeros((), dtype=torch.float64)
    return _sum_of_lanes(torch.cat(chunks)[None])[0]


def clip_coefficient(grad_norm: float, max_grad_norm: float) -> float:
    """What :func:`torch.nn.utils.clip_grad_norm_` multiplies the gradients by.

    Args:
        grad_norm: Norm of the gradients.
        max_grad_norm: What it is to be at most.

    Returns:
        At most 1; NaN for a norm of NaN.
    """
    coefficient = max_grad_norm / (grad_norm + 1e-6)
    return 1.0 if coefficient >= 1 else coefficient


def shard_axes(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """Over which ranks a tensor is cut into parts.

    Args:
        tensor: Any tensor.

    Returns:
        The device mesh of a DTensor and those of its dimensions; None where the whole tensor is
        here.
    """
    placements = getattr(tensor, "placements", ())
    axes = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return (tensor.device_mesh, axes) if axes else None  # type: ignore[attr-defined]


def sum_over_shards(sum_of_squares: Tensor, axes: tuple[Any, tuple[int, ...]]) -> None:
    """Adds the other ranks' sums, in place.

    Args:
        sum_of_squares: This rank's, of shape ().
        axes: From :func:`shard_axes`.
    """
    mesh, dimensions = axes
    for dimension in dimensions:
        torch.distributed.all_reduce(sum_of_squares, group=mesh.get_group(dimension))


def norm_of(sums: Sequence[Tensor], grad_scale: float) -> float:
    """The norm of gradients from the sums of the squares of parts of them.

    Args:
        sums: In the order of the parts.
        grad_scale: What the gradients were multiplied by.
    """
    total = sum(float(part) for part in sums)
    return math.sqrt(total) / abs(grad_scale) if total == total else math.nan


def _sums_of_chunks(values: Tensor) -> Tensor:
    values = values.detach().to(torch.float64)
    chunks = -(-values.numel() // _CHUNK)
    padded = torch.zeros(chunks * _CHUNK, dtype=torch.float64)
    padded[: values.numel()] = values * values
    return _sum_of_lanes(padded.view(chunks, _CHUNK))


def _sum_of_lanes(rows: Tensor) -> Tensor:
    """The sum of each row, each lane from left to right, then half of the lanes to the other."""
    missing = -rows.shape[1] % _LANES
    rows = torch.nn.functional.pad(rows, (0, missing))
    lanes = torch.zeros(rows.shape[0], _LANES, dtype=torch.float64)
    for part in rows.view(rows.shape[0], -1, _LANES).unbind(1):
        lanes += part
    while lanes.shape[1] > 1:
        lower, upper = lanes.chunk(2, dim=1)
        lanes = lower + upper
    return lanes[:, 0]
