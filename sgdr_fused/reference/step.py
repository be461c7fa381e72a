"""One step in plain PyTorch: the update of every parameter, then the schedule's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.groups import advance_group, drop_momentum, position_of
from sgdr_fused.options import Clipping
from sgdr_fused.reference.norm import clip_coefficient, norm_of, sum_of_squares
from sgdr_fused.reference.rounding import RandomKey, Rounded, random_bits, round_stochastically
from sgdr_fused.schedule import CosineWarmRestarts
from sgdr_fused.shards import local_tensor, shard_axes, sum_over_shards
from sgdr_fused.tensors import arithmetic_dtype, check_tensors, dtypes_of_state

__all__ = ["count_skipped", "reference_step", "update_params"]


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
        decoupled}) \\
        b &\leftarrow g \text{ at the first step, else } \mu b + (1 - \tau) g \\
        p &\leftarrow p - \eta (g + \mu b \text{ if nesterov, else } b) \\
        \bar p &\leftarrow p \text{ at first, else }
        \mathtt{ema\_decay}\, \bar p + (1 - \mathtt{ema\_decay})\, p

    The formula and its order are :class:`torch.optim.SGD`'s. The norm is over the gradients of all
    groups, as in :func:`torch.nn.utils.clip_grad_norm_`. The arithmetic is in float64 for float64
    parameters and in float32 for all others; parameter and buffer are rounded to their own dtype
    once, at the end.

    Args:
        param_groups: Param groups of a :class:`~sgdr_fused.FusedSGDR`; their schedule advances by
            one step.
        state: ``state[param]["momentum_buffer"]`` and, with their options, ``"ema"`` and
            ``"master_param"``: tensors of the parameter's shape, created at its first step.
        grad_scale: The factor that the gradients were multiplied by; they are not written.
        clipping: Options of the whole optimizer.

    Returns:
        The norm of the gradients before clipping; None if ``clipping`` does not need it.

    Raises:
        ValueError: A gradient or buffer does not fit its parameter; nothing was written.
        RuntimeError: A gradient is sparse or a parameter overlaps itself; nothing was written.
    """
    check_tensors(param_groups, state)
    norm, coefficient = None, 1.0
    if clipping.needs_norm:
        norm = _norm_of_grads(param_groups, grad_scale)
        if clipping.skip_nonfinite and not math.isfinite(norm):
            count_skipped(param_groups)
            return norm
        if clipping.max_grad_norm is not None:
            coefficient = clip_coefficient(norm, clipping.max_grad_norm)

    update_params(param_groups, state, grad_scale, coefficient)
    for group in param_groups:
        begins_cycle = advance_group(group)
        if group["reset_momentum"] and begins_cycle:
            drop_momentum(group, state)
    return norm


def count_skipped(param_groups: Iterable[MutableMapping[str, Any]]) -> None:
    """Counts a skipped step in each group."""
    for group in param_groups:
        group["skipped_steps"] += 1


def update_params(
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    grad_scale: float = 1.0,
    coefficient: float = 1.0,
    only: int | None = None,
) -> None:
    """Updates the parameters that have a gradient, and their state; the schedule stays.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's.
        grad_scale: The factor that the gradients were multiplied by.
        coefficient: The factor that clipping multiplies them by.
        only: Index over all groups of the one parameter to update; None: all.
    """
    # Before the first update, as torch.optim.SGD does it: a parameter that is listed twice gets a
    # new state twice, and keeps the second.
    entries = [
        (group, param, dict(state.get(param, {})))
        for group in param_groups
        for param in group["params"]
    ]
    for param_index, (group, param, of_param) in enumerate(entries):
        if only not in (None, param_index) or param.grad is None:
            continue
        key = RandomKey(group["seed"], group["step"], param_index)
        multiplier = -coefficient if group["maximize"] else coefficient
        new = _update(group, param, of_param, grad_scale, multiplier, key)
        if new:
            state.setdefault(param, {}).update(new)


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


def _update(
    group: MutableMapping[str, Any],
    param: Tensor,
    of_param: Mapping[str, Any],
    grad_scale: float,
    grad_multiplier: float,
    key: RandomKey,
) -> dict[str, Any]:
    """Updates a parameter and its state in place; returns the new entries of the state."""
    new: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    lazy: list[tuple[Tensor, Tensor]] = []
    for role, dtype in dtypes_of_state(group, param).items():
        tensor = of_param.get(role)
        if tensor is None:
            with torch.inference_mode(False):
                tensor = new[role] = torch.zeros_like(param, dtype=dtype)
        stored[role] = _to_write(tensor, param, lazy)
    p_stored = layout = _to_write(param, param, lazy)
    if "master_param" in stored:
        if "master_param" in new:
            stored["master_param"].copy_(p_stored)
        low_precision, p_stored = p_stored, stored["master_param"]
    p = p_stored.to(arithmetic_dtype(p_stored.dtype))
    g = _as_real(param.grad, param).to(p.dtype)
    if 0 in g.stride():
        # torch does not fuse the multiply-adds of an expanded tensor.
        g = torch.empty_like(p).copy_(g)
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
    for view, resolved in lazy:
        view.copy_(resolved)
    return new


def _average(
    group: Mapping[str, Any], p: Tensor, ema: Tensor, of_param: Mapping[str, Any]
) -> dict[str, Any]:
    """Updates a parameter's average; with "swa" returns the number of weights in it."""
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
    """Rounds a value of the arithmetic's dtype to its tensor's, stochastically if asked to."""
    if stored is value:
        return
    if not is_rounded or stored.dtype not in (torch.float16, torch.bfloat16):
        stored.copy_(value)
        return
    bits = random_bits(key, rounded, value.numel()).to(value.device)
    bits = bits.as_strided(value.shape, torch.empty_like(layout).stride())
    stored.copy_(round_stochastically(value, stored.dtype, bits))


def _in_order_of_memory(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor flattened in the order of the parameter's memory."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    flat.as_strided(tensor.shape, torch.empty_like(param).stride()).copy_(tensor)
    return flat


def _to_write(tensor: Tensor, param: Tensor, lazy: list[tuple[Tensor, Tensor]]) -> Tensor:
    """:func:`_as_real` of a tensor to be written; a lazy view is noted, with a copy to work on."""
    if not tensor.is_conj() and not tensor.is_neg():
        return _as_real(tensor, param)
    resolved = tensor.resolve_conj().resolve_neg()
    lazy.append((tensor, resolved))
    return _as_real(resolved, param)


def _as_real(tensor: Tensor | None, param: Tensor) -> Tensor:
    """A view of the local shard as real numbers."""
    assert tensor is not None
    local = local_tensor(tensor, param)
    plain = (tensor if local is None else local).resolve_conj().resolve_neg()
    return torch.view_as_real(plain) if plain.is_complex() else plain
