"""What a step accepts as parameters, gradients and momentum buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_tensors", "kinds_of_tensors", "local_tensor", "named_params"]


def named_params(
    param_groups: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any], Tensor]]:
    """Each parameter with its group and the name that error messages call it by."""
    for i, group in enumerate(param_groups):
        for j, param in enumerate(group["params"]):
            name = f'param_groups[{i}]["params"][{j}]'
            if "param_names" in group:
                name += f" ({group['param_names'][j]})"
            yield name, group, param


def local_tensor(tensor: Tensor, param: Tensor) -> Tensor | None:
    """The plain tensor behind a parameter, or behind a gradient or a momentum buffer of it.

    Args:
        tensor: Any tensor. A DTensor gives its local shard, brought to the parameter's placements
            first.
        param: The parameter that it belongs to.

    Returns:
        A tensor that shares the shard's memory; None for tensor subclasses that are not known.
    """
    if not hasattr(tensor, "to_local"):
        return tensor if type(tensor) in (Tensor, torch.nn.Parameter) else None
    if tensor.placements != param.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    local: Tensor = tensor.to_local()
    # The result of a collective that may be under way.
    return local.wait() if hasattr(local, "wait") else local


def check_tensors(
    param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Raises for the first gradient or momentum buffer that does not fit its parameter.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's.

    Raises:
        ValueError: Names the parameter, what was found and what to do.
        RuntimeError: The same, for tensors of which torch.optim.SGD would say so.
    """
    for name, group, param in named_params(param_groups):
        if not isinstance(param, Tensor):
            raise ValueError(f"{name} is {param!r}; a param group may hold tensors only")
        grad = param.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a gradient of layout {grad.layout}; FusedSGDR takes dense "
                "gradients only: "
                "use nn.Embedding(sparse=False), or torch.optim.SGD for this parameter"
            )
        if not param.is_floating_point() and not param.is_complex():
            raise ValueError(
                f"{name} has dtype {param.dtype}; only real or complex numbers can be optimised"
            )
        if param.layout != torch.strided:
            raise ValueError(f"{name} has layout {param.layout}; parameters must be dense")
        _check_fits(name, "gradient", grad, param)
        if torch._debug_has_internal_overlap(param) == 1:
            raise RuntimeError(
                f"{name} has several elements at one memory address (was it expanded?); "
                "pass param.clone() instead"
            )
        buffer = state.get(param, {}).get("momentum_buffer") if group["momentum"] != 0 else None
        if buffer is not None:
            if not isinstance(buffer, Tensor):
                raise ValueError(
                    f"{name} has momentum_buffer={buffer!r}; it must be a tensor or None"
                )
            _check_fits(name, "momentum_buffer", buffer, param)


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
                f"{name} has a {role} of {what} {_plain(found)}, but the parameter's "
                f"is {_plain(wanted)}; "
                f"set it to a tensor of that {what}, or to None"
            )
    if tensor.is_complex() != param.is_complex():
        raise ValueError(
            f"{name} has a {role} of dtype {tensor.dtype}, but the parameter's is {param.dtype}"
        )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
