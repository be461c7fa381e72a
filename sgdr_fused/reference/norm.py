"""The norm of all gradients, and the coefficient that clips them to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["clip_coefficient", "norm_of", "sum_of_squares"]

# The order of summation is in Note [Sum of squares] in csrc/sgdr_math.h.
_CHUNK = 4096
_LANES = 128


def sum_of_squares(grads: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in float64 and in a fixed order.

    Args:
        grads: Flat tensors of real numbers.

    Returns:
        A float64 tensor without dimensions, on the CPU.
    """
    chunks = [_sums_of_chunks(grad) for grad in grads if grad.numel() != 0]
    if not chunks:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return _sum_of_lanes(torch.cat(chunks)[None])[0]


def clip_coefficient(grad_norm: float, max_grad_norm: float) -> float:
    """The factor by which :func:`torch.nn.utils.clip_grad_norm_` multiplies the gradients.

    Args:
        grad_norm: Norm of the gradients.
        max_grad_norm: Largest norm after clipping; if it is infinite, any norm is left alone.

    Returns:
        At most 1; NaN for a norm of NaN and a finite limit.
    """
    coefficient = max_grad_norm / (grad_norm + 1e-6)
    return 1.0 if coefficient >= 1 or max_grad_norm == math.inf else coefficient


def norm_of(sums: Sequence[Tensor], grad_scale: float) -> float:
    """The norm of all gradients, from sums of squares over parts of them.

    Args:
        sums: In the order of the parts.
        grad_scale: The factor that the gradients were multiplied by.
    """
    total = sum(float(part) for part in sums)
    if total != total or total == grad_scale == 0:
        return math.nan
    # Python refuses to divide by 0.
    return math.sqrt(total) / abs(grad_scale) if grad_scale != 0 else math.inf


def _sums_of_chunks(values: Tensor) -> Tensor:
    values = values.detach().to(torch.float64)
    chunks = -(-values.numel() // _CHUNK)
    padded = torch.zeros(chunks * _CHUNK, dtype=torch.float64, device="cpu")
    padded[: values.numel()] = values * values
    return _sum_of_lanes(padded.view(chunks, _CHUNK))


def _sum_of_lanes(rows: Tensor) -> Tensor:
    """The sum of each row: first each lane in order, then the lanes, in halves."""
    missing = -rows.shape[1] % _LANES
    rows = torch.nn.functional.pad(rows, (0, missing))
    lanes = torch.zeros(rows.shape[0], _LANES, dtype=torch.float64, device="cpu")
    for part in rows.view(rows.shape[0], -1, _LANES).unbind(1):
        lanes += part
    while lanes.shape[1] > 1:
        lower, upper = lanes.chunk(2, dim=1)
        lanes = lower + upper
    return lanes[:, 0]
