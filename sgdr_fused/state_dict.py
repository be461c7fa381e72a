"""Packing the optimizer's state into a state_dict, and adopting one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sgdr_fused.checkpoint import CheckpointCall
from sgdr_fused.groups import check_group, move_group, position_of
from sgdr_fused.schedule import Position
from sgdr_fused.shards import placed_like
from sgdr_fused.tensors import dtypes_of_state, named_params

__all__ = ["adopted", "saved_by_param", "with_host_values"]

_ONLY_SGD = ("foreach", "differentiable", "fused")


def with_host_values(
    packed: dict[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]
) -> dict[str, Any]:
    """A state_dict with numbers in place of a group's tensors on a GPU.

    Args:
        packed: The state_dict that torch has packed; changed in place.
        groups: The optimizer's groups, as :func:`~sgdr_fused.device_state.host_copy` gives them.
        state: The optimizer's state, from there too.
    """
    params = [param for group in groups for param in group["params"]]
    for own, group in zip(groups, packed["param_groups"], strict=True):
        group.update({name: own[name] for name in group if name != "params"})
    for index in packed["state"]:
        if isinstance(index, int):
            packed["state"][index] = state[params[index]]
    return packed


def saved_by_param(
    param_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> dict[Tensor, Any]:
    """The state in a state_dict, by the parameters that it will belong to.

    Args:
        param_groups: The optimizer's.
        state_dict: The state_dict that is to be loaded.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    # torch raises if the lengths differ.
    return {
        param: state_dict["state"].get(index, {})
        for param, index in zip(params, saved, strict=False)
    }


def adopted(
    own_groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[str, Any],
    unrounded: Mapping[Tensor, Any],
) -> dict[str, Any]:
    """A loaded state, checked; entries that an SGD does not have are filled in from our groups.

    Args:
        own_groups: The optimizer's groups so far.
        loaded: The state and groups as torch's ``load_state_dict`` has prepared them.
        unrounded: The saved state by parameter, before torch rounded it to the parameter's dtype.

    Returns:
        State and groups for ``Optimizer.__setstate__``; the tensors are copies.

    Raises:
        ValueError: The state does not fit the parameters, or an option is out of its range.
    """
    groups = [
        _adopted_group(i, own, saved)
        for i, (own, saved) in enumerate(zip(own_groups, loaded["param_groups"], strict=True))
    ]
    checkpoint_call = CheckpointCall.current()
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for name, group, param in named_params(groups):
        if param not in loaded["state"]:
            continue
        of_param = {k: v for k, v in loaded["state"][param].items() if v is not None}
        if checkpoint_call is not None:
            of_param = checkpoint_call.without_placeholders(of_param)
        for role, dtype in dtypes_of_state(group, param).items():
            if role in of_param:
                saved = unrounded.get(param, {}).get(role, of_param[role])
                _check_shape(saved, role, param, name)
                copied = saved.to(param.device, dtype, copy=True)
                of_param[role] = placed_like(param, copied)
        state[param] = of_param
    return {"state": state, "param_groups": groups}


def _adopted_group(i: int, own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    group = {key: value for key, value in saved.items() if key not in _ONLY_SGD}
    group.setdefault("initial_lr", group.get("lr", own["initial_lr"]))
    is_ours = all(name in group for name in Position._fields)
    group = {key: value for key, value in own.items() if key != "lr"} | group
    group |= position_of(group)._asdict()
    group["skipped_steps"] = int(group["skipped_steps"])
    try:
        group["initial_lr"] = float(group["initial_lr"])
        check_group(group)
        lr = group["lr"]
        if not is_ours or "scheduled_lr" not in saved:
            move_group(group, position_of(group))
        if is_ours:
            group["lr"] = lr
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the state_dict does not fit: param_groups[{i}]: {error!r}") from error
    return group


def _check_shape(saved: Any, role: str, param: Tensor, name: str) -> None:
    if not isinstance(saved, Tensor) or saved.shape != param.shape:
        found = tuple(saved.shape) if isinstance(saved, Tensor) else repr(saved)
        raise ValueError(
            f"the state_dict does not fit: {name} has shape {tuple(param.shape)}, "
            f"its {role} {found}; was it saved from another model?"
        )
