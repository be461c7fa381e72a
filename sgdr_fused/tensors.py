"""The tensors of a step: parameters, gradients and state, their dtypes and their checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.groups import check_groups
from sgdr_fused.options import Clipping
from sgdr_fused.shards import find_flat_shard, local_tensor, place_in_words, placement_of

__all__ = [
    "arithmetic_dtype",
    "check_tensors",
    "dtypes_of_state",
    "kinds_of_tensors",
    "named_params",
    "refuse_norm_of_flat_shards",
]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of a dtype is updated; complex for a complex one."""
    wide = dtype in (torch.float64, torch.complex128)
    if dtype.is_complex:
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else torch.float32


def dtypes_of_state(group: Mapping[str, Any], param: Tensor) -> dict[str, torch.dtype]:
    """The tensors that a parameter has in the optimizer's state, and their dtypes.

    Args:
        group: The parameter's group.
        param: The parameter.

    Raises:
        ValueError: The group has a momentum_dtype, and the parameter is complex.
    """
    dtypes = {}
    has_master = group["master_weights"] and param.dtype in (torch.float16, torch.bfloat16)
    if group["momentum"] != 0:
        momentum_dtype = group["momentum_dtype"]
        if momentum_dtype is not None and param.is_complex():
            raise ValueError(
                f"momentum_dtype={momentum_dtype} is for real parameters, but one has dtype "
                f"{param.dtype}; give the complex ones a param group without momentum_dtype"
            )
        dtypes["momentum_buffer"] = momentum_dtype or (torch.float32 if has_master else param.dtype)
    if group["ema_decay"] is not None:
        dtypes["ema"] = arithmetic_dtype(param.dtype)
    if has_master:
        dtypes["master_param"] = torch.float32
    return dtypes


def named_params(
    param_groups: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any], Tensor]]:
    """Each parameter with its name for error messages, and its group."""
    for i, group in enumerate(param_groups):
        names = group.get("param_names", ())  # fewer if the user has appended to params only
        for j, param in enumerate(group["params"]):
            name = f'param_groups[{i}]["params"][{j}]'
            if j < len(names):
                name += f" ({names[j]})"
            yield name, group, param


def check_tensors(
    param_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    only: int | None = None,
) -> None:
    """Raises for the first gradient or tensor of the state that does not fit its parameter.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's.
        only: Check that parameter alone, given its index over all groups. Another thread may be
            writing the gradients of the others.

    Raises:
        ValueError: Names the parameter, what was found and what to do.
        RuntimeError: The same, where torch.optim.SGD raises a RuntimeError.
    """
    for i, (name, group, param) in enumerate(named_params(param_groups)):
        if only not in (None, i):
            continue
        grad = param.grad
        if grad is None:
            continue
        if param.layout != torch.strided:
            raise ValueError(
                f"{name} has layout {param.layout}; FusedSGDR takes dense parameters only: use "
                "torch.optim.SGD for this one"
            )
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a gradient of layout {grad.layout}; FusedSGDR takes dense gradients "
                "only: use nn.Embedding(sparse=False), or torch.optim.SGD for this parameter"
            )
        if not param.is_floating_point() and not param.is_complex():
            raise ValueError(
                f"{name} has dtype {param.dtype}; only real or complex numbers can be optimised"
            )
        _check_fits(name, "gradient", grad, param)
        if placement_of(grad) is not None and placement_of(param) is None:
            raise ValueError(
                f"{name} is a plain tensor, but its gradient a {type(grad).__name__}; set the "
                "gradient to its full_tensor() or to_local()"
            )
        _check_writable(name, param)
        tensors = {"parameter": param, "gradient": grad}
        of_param = state.get(param, {})
        if not isinstance(of_param, dict):
            raise TypeError(
                f"optimizer.state[param] is of type {type(of_param).__name__}, but must be a dict; "
                "delete it to start anew"
            )
        for role, dtype in dtypes_of_state(group, param).items():
            tensor = of_param.get(role)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} has {role}={tensor!r}; it must be a tensor or None")
            _check_fits(name, role, tensor, param)
            _check_writable(f"{name}'s {role}", tensor)
            if placement_of(tensor) != placement_of(param):
                raise ValueError(
                    f"{name} is placed as {place_in_words(param)}, but its {role} as "
                    f"{place_in_words(tensor)}; redistribute() one of the two, or let "
                    "load_state_dict() place the state"
                )
            # A momentum buffer may be of any precision: momentum_dtype can be changed.
            is_fit = (
                tensor.is_floating_point() or tensor.is_complex()
                if role == "momentum_buffer"
                else tensor.dtype == dtype
            )
            if not is_fit:
                raise ValueError(
                    f"{name} has state[{role!r}] of dtype {tensor.dtype}; it must be of {dtype}"
                )
            tensors[role] = tensor
        _refuse_shared_memory(name, tensors)


def refuse_norm_of_flat_shards(
    param_groups: Sequence[MutableMapping[str, Any]], clipping: Clipping
) -> None:
    """Raises if the norm of the gradients would be that of this rank's shards alone.

    Args:
        param_groups: The optimizer's.
        clipping: Options of the whole optimizer.

    Raises:
        ValueError: Names the option, the parameter and what to do.
        TypeError: The groups are no such thing.
    """
    if not clipping.needs_norm:
        return
    check_groups(param_groups)
    shard = find_flat_shard(param for group in param_groups for param in group["params"])
    if shard is None:
        return
    name = next(name for name, _, param in named_params(param_groups) if param is shard)
    if (norm := clipping.max_grad_norm) is not None:
        option = f"max_grad_norm={norm!r}"
        instead = f"set it to None, and call model.clip_grad_norm_({norm!r}) before step()"
    else:
        option = "skip_nonfinite=True"
        instead = (
            "set it to False, and let a ShardedGradScaler skip steps, or call step() only if the "
            "norm that model.clip_grad_norm_() returns is finite"
        )
    raise ValueError(
        f"{option} needs the norm over all ranks, but {name} is a shard of "
        f"FullyShardedDataParallel (FSDP1), which does not tell its ranks; {instead}; or shard the "
        "model with fully_shard() (FSDP2)"
    )


def kinds_of_tensors(param_groups: Sequence[Mapping[str, Any]]) -> str:
    """The kinds of parameters and gradients in use, for a message."""
    kinds = {
        f"{type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
        for _, _, param in named_params(param_groups)
        for tensor in (param, param.grad)
        if tensor is not None
    }
    return ", ".join(sorted(kinds))


def _check_fits(name: str, role: str, tensor: Tensor, param: Tensor) -> None:
    for what in ("shape", "device"):
        found, wanted = getattr(tensor, what), getattr(param, what)
        if found != wanted:
            raise ValueError(
                f"{name} has a {role} of {what} {_plain(found)}, but the parameter's is "
                f"{_plain(wanted)}; set it to a tensor of that {what}, or to None"
            )
    if tensor.is_complex() != param.is_complex():
        raise ValueError(
            f"{name} has a {role} of dtype {tensor.dtype}, but the parameter's is {param.dtype}"
        )


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made in inference mode, so it cannot be updated outside of it; pass a "
            "clone() of it instead"
        )
    if tensor._is_zerotensor():
        raise RuntimeError(f"{name} is a ZeroTensor, without memory; pass a clone() of it instead")
    if torch._debug_has_internal_overlap(tensor) == 1:
        raise RuntimeError(
            f"{name} has several elements at one memory address (was it expanded?); "
            "pass a clone() of it instead"
        )


def _refuse_shared_memory(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises if writing one tensor of a parameter changes another."""
    ranges = {role: _memory(tensor) for role, tensor in tensors.items()}
    for (role, own), (other, theirs) in combinations(ranges.items(), 2):
        # A gradient may be the parameter itself, which is updated element by element.
        is_itself = {role, other} == {"parameter", "gradient"} and own == theirs
        if own and theirs and own[0] < theirs[1] and theirs[0] < own[1] and not is_itself:
            raise ValueError(
                f"{name}'s {other} shares memory with its {role}; pass a clone() of one of them"
            )


def _memory(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses between which a tensor lies, up to the first gap between its elements."""
    local = local_tensor(tensor, tensor)
    if local is None or local.numel() == 0:
        return None
    numel = 1
    for stride, size in sorted(zip(local.stride(), local.shape, strict=True)):
        if size == 1:
            continue
        if stride != numel:
            break
        numel *= size
    begin = local.data_ptr()
    return begin, begin + numel * local.element_size()


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
