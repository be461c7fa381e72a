"""The step in plain PyTorch: the definition that every native backend is tested against."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgdr_fused.grad_norm import (
    clip_coefficient,
    norm_of,
    shard_axes,
    sum_of_squares,
    sum_over_shards,
)
from sgdr_fused.groups import (
    drop_momentum,
    is_unchanged,
    move_group,
    position_of,
    sync_group,
)
from sgdr_fused.rounding import RandomKey, Rounded, random_bits, round_stochastically
from sgdr_fused.schedule import CosineWarmRestarts
from sgdr_fused.tensors import arithmetic_dtype, check_tensors, dtypes_of_state, local_tensor

__all__ = ["Clipping", "ReferenceStepper", "reference_step"]


class Clipping(NamedTuple):
    """What the norm of all gradients is for.

    Attributes:
        max_grad_norm: The gradients are scaled down to at most this norm; None: they are not.
        skip_nonfinite: A step whose gradients hold an infinity or NaN is skipped.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False

    @property
    def needs_norm(self) -> bool:
        """Whether the gradients have to be read for it."""
        return self.max_grad_norm is not None or self.skip_nonfinite


class ReferenceStepper:
    """Stands where the native extension's ``Stepper`` stands: one optimizer's step.

    Args:
        warning: What to warn of at the first step; empty: nothing.
    """

    def __init__(self, warning: str = "") -> None:
        self._warning = warning
        self._groups_before: list[dict[str, Any]] = []
        self._clipping = Clipping()
        self.grad_norm: float | None = None

    def set_clipping(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        """Sets the options that are the whole optimizer's: see :class:`Clipping`."""
        self._clipping = Clipping(max_grad_norm, skip_nonfinite)

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
            if not is_unchanged(group, before):
                sync_group(group, before.get("lr"))
                self._groups_before[i : i + 1] = [dict(group)]
        del self._groups_before[len(param_groups) :]

    # Its roundings are the definition. Without this, torch.compile of torch 2.11 traces what is
    # called at a graph break, and rounds an add(alpha=...) twice.
    @torch._disable_dynamo  # type: ignore[attr-defined]
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
            _count_skipped(param_groups)
            return True
        self.sync(param_groups, state)
        if self._warning:
            warnings.warn(self._warning, stacklevel=_frames_to_caller())
            self._warning = ""
        scale = 1.0 if grad_scale is None else float(grad_scale)
        self.grad_norm = reference_step(param_groups, state, scale, self._clipping)
        self._groups_before = [dict(group) for group in param_groups]
        return True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step_param(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        index: int,
    ) -> bool:
        """The update of one parameter; the schedule stays.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.
            index: The parameter's place among those of all groups.

        Returns:
            True, as for :meth:`step`.

        Raises:
            ValueError: As for :meth:`step`.
            RuntimeError: As for :meth:`step`.
        """
        self.sync(param_groups, state)
        check_tensors(param_groups, state)
        with torch.no_grad():
            _update_params(param_groups, state, only=index)
        return True


@torch.no_grad()
def reference_step(
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    grad_scale: float = 1.0,
    clipping: Clipping = Clipping(),  # noqa: B008
) -> float | None:
    r"""One step of SGD with momentum for every parameter that has a gradient, then of the schedule.

    .. math::
        g &\leftarrow \mathtt{grad} / \mathtt{grad\_scale} \cdot
        \min(1, \mathtt{max\_grad\_norm} / (\lVert g \rVert + 10^{-6}))
        \qquad (-g \text{ if maximize}) \\
        g &\leftarrow g + \lambda p \qquad (p \leftarrow p (1 - \eta \lambda) \text{ instead if
        decoupled}) \\ b &\leftarrow g \text{ at the first step, else } \mu b + (1 - \tau) g \\
        p &\leftarrow p - \eta (g + \mu b \text{ if nesterov, else } b) \\
        \bar p &\leftarrow p \text{ at first, else }
        \mathtt{ema\_decay}\, \bar p + (1 - \mathtt{ema\_decay})\, p

    The formula and its order are :class:`torch.optim.SGD`'s; the norm is that of
    :func:`torch.nn.utils.clip_grad_norm_`, over the gradients of all groups. Arithmetic is in
    float64 for float64 parameters and in float32 for all others; parameter and buffer are rounded
    to their own dtype once, at the end.

    Args:
        param_groups: Param groups of a :class:`~sgdr_fused.FusedSGDR`; their schedule entries are
            brought one step forward.
        state: Momentum buffers, ``state[param]["momentum_buffer"]``, of the parameter's shape;
            made at a parameter's first step.
        grad_scale: What the gradients were multiplied by. They are not written back.
        clipping: Options of the whole optimizer.

    Returns:
        The norm of the gradients before clipping; None where `clipping` asks for none.

    Raises:
        ValueError: A gradient or buffer does not fit its parameter; nothing was written.
        RuntimeError: A gradient is sparse or a parameter overlaps itself; nothing was written.
    """
    check_tensors(param_groups, state)
    norm, coefficient = None, 1.0
    if clipping.needs_norm:
        norm = _norm_of_grads(param_groups, grad_scale)
        if clipping.skip_nonfinite and not math.isfinite(norm):
            _count_skipped(param_groups)
            return norm
        if clipping.max_grad_norm is not None:
            coefficient = clip_coefficient(norm, clipping.max_grad_norm)

    _update_params(param_groups, state, grad_scale, coefficient)
    for group in param_groups:
        _advance_group(group, state)
    return norm


def _update_params(
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    grad_scale: float = 1.0,
    coefficient: float = 1.0,
    only: int | None = None,
) -> None:
    param_index = -1
    for group in param_groups:
        for param in group["params"]:
            param_index += 1
            if param.grad is None or only not in (None, param_index):
                continue
            key = RandomKey(group["seed"], group["step"], param_index)
            multiplier = -coefficient if group["maximize"] else coefficient
            new = _update(group, param, state.get(param, {}), grad_scale, multiplier, key)
            if new:
                state[param].update(new)


def _norm_of_grads(param_groups: Sequence[MutableMapping[str, Any]], grad_scale: float) -> float:
    parts: dict[Any, list[Tensor]] = {None: []}
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                flat = _in_order_of_memory(_as_real(param.grad, param), _as_real(param, param))
                parts.setdefault(shard_axes(param), []).append(flat)
    sums = []
    for axes, grads in parts.items():
        sums.append(sum_of_squares(grads))
        if axes is not None:
            sum_over_shards(sums[-1], axes)
    return norm_of(sums, grad_scale)


def _count_skipped(param_groups: Iterable[MutableMapping[str, Any]]) -> None:
    for group in param_groups:
        group["skipped_steps"] += 1


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
    of_param: Mapping[str, Any],
    grad_scale: float,
    grad_multiplier: float,
    key: RandomKey,
) -> dict[str, Any]:
    """Updates a parameter and its state; returns what is new in the state."""
    new: dict[str, Any] = {}
    stored = {}
    for role, dtype in dtypes_of_state(group, param).items():
        tensor = of_param.get(role)
        if tensor is None:
            tensor = new[role] = torch.zeros_like(param, dtype=dtype)
        stored[role] = _as_real(tensor, param)
    p_stored = layout = _as_real(param, param)
    if "master_param" in stored:
        if "master_param" in new:
            stored["master_param"].copy_(p_stored)
        low_precision, p_stored = p_stored, stored["master_param"]
    p = p_stored.to(arithmetic_dtype(p_stored.dtype))
    g = _as_real(param.grad, param).to(p.dtype)
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]

    if grad_scale != 1:
        g = g / grad_scale
    if grad_multiplier != 1:
        g = g * grad_multiplier
    if weight_decay != 0:
        if group["decoupled_weight_decay"]:
            p.mul_(1 - lr * weight_decay)
        else:
            g = g.add(p, alpha=weight_decay)

    direction = g
    if "momentum_buffer" in stored:
        b_stored = stored["momentum_buffer"]
        b = b_stored.to(p.dtype)
        if "momentum_buffer" in new:
            b.copy_(g)
        else:
            b.mul_(momentum).add_(g, alpha=1 - group["dampening"])
        direction = g.add(b, alpha=momentum) if group["nesterov"] else b
        p.add_(direction, alpha=-lr)
        is_rounded = group["stochastic_rounding"] or group["momentum_dtype"] is not None
        _store(b, b_stored, layout, is_rounded, key, Rounded.MOMENTUM_BUFFER)
    else:
        p.add_(direction, alpha=-lr)

    if "ema" in stored:
        new |= _average(group, p, stored["ema"], of_param)
        if group["ema_decay"] == "swa" and "n_averaged" not in new:
            new.pop("ema", None)
    _store(p, p_stored, layout, group["stochastic_rounding"], key, Rounded.PARAM)
    if "master_param" in stored:
        low_precision.copy_(p)
    return new


def _average(
    group: Mapping[str, Any], p: Tensor, ema: Tensor, of_param: Mapping[str, Any]
) -> dict[str, Any]:
    """Takes a parameter into its average; returns the number of weights in an equal one."""
    decay = group["ema_decay"] if of_param.get("ema") is not None else 0.0
    new = {}
    if group["ema_decay"] == "swa":
        if not CosineWarmRestarts.of_group(group).ends_cycle(position_of(group)):
            return {}
        n_averaged = of_param.get("n_averaged", 0) if of_param.get("ema") is not None else 0
        decay = n_averaged / (n_averaged + 1)
        new["n_averaged"] = n_averaged + 1
    if decay == 0:
        ema.copy_(p)
    else:
        ema.mul_(decay).add_(p, alpha=1 - decay)
    return new


def _store(
    value: Tensor,
    stored: Tensor,
    layout: Tensor,
    is_rounded: bool,
    key: RandomKey,
    rounded: Rounded,
) -> None:
    if stored is value:
        return
    if not is_rounded or stored.dtype not in (torch.float16, torch.bfloat16):
        stored.copy_(value)
        return
    bits = random_bits(key, rounded, value.numel())
    bits = bits.as_strided(value.shape, torch.empty_like(layout).stride())
    stored.copy_(round_stochastically(value, stored.dtype, bits))


def _in_order_of_memory(tensor: Tensor, param: Tensor) -> Tensor:
    """The elements in the order in which the parameter's lie in memory."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    flat.as_strided(tensor.shape, torch.empty_like(param).stride()).copy_(tensor)
    return flat


def _as_real(tensor: Tensor | None, param: Tensor) -> Tensor:
    """A view as real numbers, of the local shard."""
    assert tensor is not None
    local = local_tensor(tensor, param)
    plain = tensor if local is None else local
    return torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
