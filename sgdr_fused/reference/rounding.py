"""Stochastic rounding to float16 and bfloat16, with random numbers from a counter."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RandomKey", "Rounded", "random_bits", "round_stochastically"]

_DRAW_NUMEL = 64
_WORD = 0xFFFFFFFF


class Rounded(IntEnum):
    """The value of a parameter that is rounded."""

    PARAM = 0
    MOMENTUM_BUFFER = 1


class RandomKey(NamedTuple):
    """All that the random numbers of a parameter at a step depend on, besides the element.

    Attributes:
        seed: From 0 to 2^64 - 1.
        step: Number of steps that the parameter's group has applied before.
        param_index: The parameter's index over all groups.
    """

    seed: int
    step: int
    param_index: int


def random_bits(key: RandomKey, rounded: Rounded, numel: int) -> Tensor:
    """16 random bits for each element; see Note [Random bits] in csrc/random_rounding.h.

    Args:
        key: Seed, step and parameter.
        rounded: The value that is rounded with them.
        numel: Number of elements.

    Returns:
        Integers from 0 to 65535, of dtype int64 and shape (numel,), in the order of memory, on the
        CPU.

    References:
        Philox4x32-10: Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
    """
    draws = torch.arange((numel + _DRAW_NUMEL - 1) // _DRAW_NUMEL, device="cpu")
    words = [
        draws & _WORD,
        (draws >> 32 << 1 & _WORD) | rounded,
        torch.full_like(draws, key.param_index & _WORD),
        torch.full_like(draws, key.step & _WORD),
    ]
    words = _philox(words, key.seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    flips = torch.arange(8, device="cpu").mul(1 << 13)
    return (halves[:, None, :] ^ flips[None, :, None]).reshape(-1)[:numel]


def round_stochastically(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds away from zero with the probability of the part that is cut off, else towards zero.

    Args:
        value: Real numbers; float64 is rounded to float32 first.
        dtype: float16 or bfloat16.
        bits: From :func:`random_bits`, of the value's shape.

    Returns:
        A tensor of that dtype. Its expectation is the value, if the value is finite and within
        the dtype's range.
    """
    exact = value.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & _WORD
    magnitude = exact & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        is_nan = magnitude > 0x7F800000
        rounded = torch.where(is_nan, exact | 0x00400000, exact + bits) >> 16
    else:
        cut_off = bits >> 3
        # In units of 2^-24, the smallest float16 above 0, with 13 bits after the point.
        small = (magnitude.to(torch.int32).view(torch.float32).double() * 2**37).clamp_(max=2**30)
        subnormal = small.to(torch.int64) + cut_off >> 13
        normal = magnitude + cut_off - 0x38000000 >> 13
        normal = torch.where(magnitude + cut_off < 0x47800000, normal, 0x7C00)
        rounded = torch.where(magnitude < 0x38800000, subnormal, normal)
        rounded = torch.where(magnitude == 0x7F800000, 0x7C00, rounded)
        rounded = torch.where(magnitude > 0x7F800000, 0x7E00, rounded)
        rounded = rounded | (exact >> 16 & 0x8000)
    return rounded.to(torch.int16).view(dtype)


def _philox(counter: list[Tensor], key: int) -> list[Tensor]:
    words = counter
    keys = [key & _WORD, key >> 32 & _WORD]
    for _ in range(10):
        high_0, low_0 = _multiply(0xD2511F53, words[0])
        high_1, low_1 = _multiply(0xCD9E8D57, words[2])
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(keys[0] + 0x9E3779B9) & _WORD, (keys[1] + 0xBB67AE85) & _WORD]
    return words


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower word of a product of two words, which would overflow an int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle << 16 | low & 0xFFFF) & _WORD
