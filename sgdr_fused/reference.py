"""The step in plain PyTorch: the definition that every native backend is tested against."""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.groups import drop_momentum, move_group, position_of, sync_group
from sgdr_fused.schedule import CosineWarmRestarts
from sgdr_fused.tensors import check_tensors, local_tensor

__all__ = ["ReferenceStepper", "reference_step"]


class ReferenceStepper:
    """Stands where the native extension's ``Stepper`` stands: one optimizer's step.

    Args:
        warning: What to warn of at the first step; empty: nothing.
    """

    def __init__(self, warning: str = "") -> None:
        self._warning = warning
        self._groups_before: list[dict[str, Any]] = []

    def sync(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
    ) -> None:
        """Takes over what has changed in the groups since they were last seen.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.

        Raises:
            ValueError: An option is out of its range.
        """
        for i, group in enumerate(param_groups):
            before = self._groups_before[i] if i < len(self._groups_before) else {}
            if group.keys() != before.keys() or any(group[key] is not before[key] for key in group):
                sync_group(group, before.get("lr"))
                self._groups_before[i : i + 1] = [dict(group)]
        del self._groups_before[len(param_groups) :]

    def step(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: float | Tensor | None,
        found_inf: float | Tensor | None,
    ) -> bool:
        """Takes changed options over, then takes the step.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.
            grad_scale: What the gradients were multiplied by; None: by nothing.
            found_inf: Not 0: the step is skipped.

        Returns:
            True: the reference takes every step, or raises.

        Raises:
            ValueError: An option, gradient or buffer is not valid; nothing was written.
            RuntimeError: A gradient is sparse or a parameter overlaps itself; nothing was written.
        """
        if found_inf is not None and float(found_inf) != 0:
            return True
        self.sync(param_groups, state)
        if self._warning:
            warnings.warn(self._warning, stacklevel=_frames_to_caller())
            self._warning = ""
        reference_step(param_groups, state, 1.0 if grad_scale is None else float(grad_scale))
        self._groups_before = [dict(group) for group in param_groups]
        return True


@torch.no_grad()
def reference_step(
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    grad_scale: float = 1.0,
) -> None:
    r"""One step of SGD with momentum for every parameter that has a gradient, then of the schedule.

    .. math::
        g &\leftarrow \mathtt{grad} / \mathtt{grad\_scale} \qquad (-g \text{ if maximize}) \\
        g &\leftarrow g + \lambda p \qquad (p \leftarrow p (1 - \eta \lambda) \text{ instead if
        decoupled}) \\ b &\leftarrow g \text{ at the first step, else } \mu b + (1 - \tau) g \\
        p &\leftarrow p - \eta (g + \mu b \text{ if nesterov, else } b)

    The formula and its order are :class:`torch.optim.SGD`'s. Arithmetic is in float64 for float64
    parameters and in float32 for all others; parameter and buffer are rounded to their own dtype
    once, at the end.

    Args:
        param_groups: Param groups of a :class:`~sgdr_fused.FusedSGDR`; their schedule entries are
            brought one step forward.
        state: Momentum buffers, ``state[param]["momentum_buffer"]``, of the parameter's shape;
            made at a parameter's first step.
        grad_scale: What the gradients were multiplied by. They are not written back.

    Raises:
        ValueError: A gradient or buffer does not fit its parameter; nothing was written.
        RuntimeError: A gradient is sparse or a parameter overlaps itself; nothing was written.
    """
    check_tensors(param_groups, state)
    for group in param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            buffer = None
            if group["momentum"] != 0:
                buffer = state[param].get("momentum_buffer")
            is_first = group["momentum"] != 0 and buffer is None
            if is_first:
                buffer = torch.zeros_like(param)
            _update(group, param, buffer, is_first, grad_scale)
            if is_first:
                state[param]["momentum_buffer"] = buffer
    for group in param_groups:
        _advance_group(group, state)


def _frames_to_caller() -> int:
    """The stacklevel at which a warning points to the code that called ``step()``."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(
        ("sgdr_fused.", "torch.")
    ):
        frame, level = frame.f_back, level + 1
    return level


def _advance_group(group: MutableMapping[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    schedule = CosineWarmRestarts.of_group(group)
    position = schedule.advance(position_of(group))
    move_group(group, position)
    if group["reset_momentum"] and schedule.is_restart(position):
        drop_momentum(group, state)


def _update(
    group: MutableMapping[str, Any],
    param: Tensor,
    momentum_buffer: Tensor | None,
    is_first: bool,
    grad_scale: float,
) -> None:
    p_stored = _as_real(param, param)
    p = _to_arithmetic(p_stored)
    g = _to_arithmetic(_as_real(param.grad, param), p.dtype)
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]

    if grad_scale != 1:
        g = g / grad_scale
    if group["maximize"]:
        g = -g
    if weight_decay != 0:
        if group["decoupled_weight_decay"]:
            p.mul_(1 - lr * weight_decay)
        else:
            g = g.add(p, alpha=weight_decay)

    direction = g
    if momentum_buffer is not None:
        b_stored = _as_real(momentum_buffer, param)
        b = _to_arithmetic(b_stored, p.dtype)
        if is_first:
            b.copy_(g)
        else:
            b.mul_(momentum).add_(g, alpha=1 - group["dampening"])
        direction = g.add(b, alpha=momentum) if group["nesterov"] else b
        p.add_(direction, alpha=-lr)
        if b is not b_stored:
            b_stored.copy_(b)
    else:
        p.add_(direction, alpha=-lr)
    if p is not p_stored:
        p_stored.copy_(p)


def _as_real(tensor: Tensor | None, param: Tensor) -> Tensor:
    """A view as real numbers, of the local shard."""
    assert tensor is not None
    local = local_tensor(tensor, param)
    plain = tensor if local is None else local
    return torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain


def _to_arithmetic(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor itself where it has the dtype of the arithmetic, else a copy."""
    if dtype is None:
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(dtype)
