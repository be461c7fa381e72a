"""Uses of the averages that ``ema_decay`` keeps: evaluation, and saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["averages_by_name", "swapped_in"]


@contextmanager
def swapped_in(
    param_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    lock: AbstractContextManager[Any],
) -> Iterator[None]:
    """Swaps the averages in for a ``with`` block; see :meth:`~sgdr_fused.FusedSGDR.swap_ema`.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's, on the host.
        lock: The optimizer's; no other thread's step may run while values are copied.
    """
    averages = {
        param: state[param]["ema"]
        for param in _params(param_groups)
        if state.get(param, {}).get("ema") is not None
    }
    # All before the first is overwritten: parameters may share memory.
    with lock:
        own = {param: param.detach().clone() for param in averages}
    try:
        with lock, torch.no_grad():
            for param, ema in averages.items():
                param.copy_(ema)
        yield
    finally:
        with lock, torch.no_grad():
            for param, value in own.items():
                param.copy_(value)


def averages_by_name(
    param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Copies of the averages; see :meth:`~sgdr_fused.FusedSGDR.ema_state_dict`.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's, on the host.

    Raises:
        ValueError: A group has no names.
    """
    averages = {}
    for i, group in enumerate(param_groups):
        if "param_names" not in group:
            raise ValueError(
                f"param_groups[{i}] has no parameter names; make the optimizer with "
                "model.named_parameters() instead of model.parameters()"
            )
        for name, param in zip(group["param_names"], group["params"], strict=True):
            ema = state.get(param, {}).get("ema")
            averages[name] = (param if ema is None else ema).detach().clone()
    return averages


def _params(param_groups: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
    for group in param_groups:
        yield from group["params"]
