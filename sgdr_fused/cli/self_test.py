"""A few steps of the native backend against the reference, for ``sgdr-fused doctor``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.optimizer import FusedSGDR
from sgdr_fused.options import Backend

__all__ = ["CASES", "faults"]

_SGD = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
CASES: dict[str, dict[str, Any]] = {
    "plain SGD": {},
    "momentum": _SGD,
    "warm-up, decay of the peaks": {**_SGD, "warmup_steps": 3, "cycle_decay": 0.5, "T_mult": 2},
    "averages": {**_SGD, "ema_decay": 0.9, "decoupled_weight_decay": True},
    "low precision": {
        "momentum": 0.5,
        "momentum_dtype": torch.bfloat16,
        "stochastic_rounding": True,
    },
    "master weights": {**_SGD, "master_weights": True, "reset_momentum": True},
}
"""Options, by what they try. None needs the norm, whose order of summation differs on a GPU."""

# A scalar, a vector with a tail, and more elements than a block or a thread takes.
_SHAPES = ((), (7,), (33, 5), (10_000,))
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STEPS = 8


def faults(device: str) -> Iterator[str]:
    """Takes steps with the native backend and the reference, and compares the parameters.

    In float32 and the half types they must be equal to the bit; in float64 on a GPU to 1e-12, as
    its cosine may differ in the last bit.

    Args:
        device: Where the native backend steps; the reference steps on the CPU.

    Yields:
        A sentence for each case and dtype that differs.
    """
    for (name, options), dtype in itertools.product(CASES.items(), _DTYPES):
        try:
            native = _trained("native", device, dtype, options)
        except RuntimeError as error:
            yield f"{name}, {dtype}: {error}"
            continue
        reference = _trained("reference", "cpu", dtype, options)
        may_differ = dtype == torch.float64 and device != "cpu"
        worst = max(
            _difference(ours.cpu(), theirs, may_differ)
            for ours, theirs in zip(native, reference, strict=True)
        )
        if worst != 0:
            yield f"{name}, {dtype}: differs from the reference by up to {worst:.3g}"


def _trained(
    backend: Backend, device: str, dtype: torch.dtype, options: dict[str, Any]
) -> Sequence[Tensor]:
    """Parameters and averages after some steps over a restart."""
    draws = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=draws, device="cpu").to(device, dtype)

    params = [torch.nn.Parameter(draw(shape)) for shape in _SHAPES]
    optimizer = FusedSGDR(params, lr=0.1, T_0=5, eta_min=0.001, backend=backend, **options)
    for _ in range(_STEPS):
        for param in params:
            param.grad = draw(param.shape)
        optimizer.step()
    averages = [optimizer.state[param].get("ema") for param in params]
    return [x.detach() for x in (*params, *averages) if x is not None]


def _difference(ours: Tensor, theirs: Tensor, may_differ: bool) -> float:
    if torch.equal(ours, theirs):
        return 0.0
    difference = (ours.double() - theirs.double()).abs().max().item()
    return 0.0 if may_differ and difference < 1e-12 else difference or float("nan")
