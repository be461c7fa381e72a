"""Packing the optimizer's state into a state_dict, and adopting one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.checkpoint import CheckpointCall
from sgdr_fused.groups import check_group, move_group, position_of
from sgdr_fused.options import Clipping, checked_clipping, plain_options
from sgdr_fused.schedule import Position
from sgdr_fused.shards import placed_like
from sgdr_fused.tensors import dtypes_of_state, named_params
from sgdr_fused.values import STEP, shown

__all__ = [
    "adopted",
    "clipping_in",
    "fitted",
    "saved_by_param",
    "with_host_values",
    "without_functions",
]

# The entries that every torch.optim.SGD has, and those that it may have.
_OF_SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
_MAYBE_OF_SGD = ("maximize", "foreach", "differentiable", "fused", "initial_lr")
_FUNCTION = "function"  # in the place of one
_ROLES = ("momentum_buffer", "ema", "master_param")
# They are in a saved group, but not in ours.
_NOT_OURS = ("foreach", "differentiable", "fused", *Clipping._fields)


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


def without_functions(packed: dict[str, Any]) -> dict[str, Any]:
    """A state_dict without functions, so that it loads with ``weights_only=True``.

    Args:
        packed: The state_dict that torch has packed; changed in place.
    """
    for group in packed["param_groups"]:
        if callable(group.get("ema_decay")):
            group["ema_decay"] = _FUNCTION
    return packed


def fitted(
    own_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """A state_dict whose parameters are in our order; not written.

    Args:
        own_groups: The optimizer's groups.
        state_dict: The state_dict that is to be loaded.

    Raises:
        ValueError: It is no state_dict of ours or of torch.optim.SGD, or the names differ.
    """
    _check_form(state_dict)
    groups = state_dict["param_groups"]
    for i, group in enumerate(groups):
        _refuse_other_optimizer(i, group, state_dict["state"])
    # torch says what is wrong if the lengths differ.
    in_our_order = [
        _in_our_order(i, own, groups) for i, own in enumerate(own_groups[: len(groups)])
    ]
    return {**state_dict, "param_groups": in_our_order + groups[len(own_groups) :]}


def _check_form(state_dict: Mapping[str, Any]) -> None:
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise _misfit(
            f'it has the keys {shown([*state_dict])}, but needs a list "param_groups" and a dict '
            '"state"; pass what state_dict() has returned'
        )
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise _misfit(f'param_groups[{i}] is {shown(group)}, no dict with a list "params"')
    for index, of_param in state.items():
        if not isinstance(of_param, Mapping):
            raise _misfit(f"state[{index!r}] is {shown(of_param)}, no dict")


def _refuse_other_optimizer(
    i: int, group: Mapping[str, Any], state: Mapping[Any, Mapping[str, Any]]
) -> None:
    if _is_ours(group):
        return
    missing = [name for name in _OF_SGD if name not in group]
    of_others = {key for index in group["params"] for key in state.get(index, {})}
    of_others -= {"momentum_buffer"}
    if missing or of_others:
        unknown = group.keys() - {"params", "param_names", *_OF_SGD, *_MAYBE_OF_SGD}
        raise _misfit(
            f"it is of another optimizer than FusedSGDR and torch.optim.SGD: param_groups[{i}] "
            f"lacks {_some(missing)} and has {_some(unknown)}, and its state has {_some(of_others)}"
        )


def _is_ours(group: Mapping[str, Any]) -> bool:
    return all(name in group for name in ("lr", *Position._fields))


def _in_our_order(
    i: int, own: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A saved group with its parameters in our order, if both sides know their names."""
    group = dict(saved_groups[i])
    names, saved_names = own.get("param_names"), group.pop("param_names", None)
    if names is None or saved_names is None or _is_in_our_order(own, group):
        return group
    missing = [name for name in names if name not in saved_names]
    unknown = [name for name in saved_names if name not in names]
    if missing or unknown or not len({*names}) == len(names) == len(group["params"]):
        elsewhere = [
            f"{name!r} is in the saved param_groups[{j}]"
            for j, other in enumerate(saved_groups)
            for name in missing
            if j != i and name in other.get("param_names", ())
        ]
        raise _misfit(
            f"param_groups[{i}] of the optimizer has the parameters {_some(names)}, the saved one "
            f"has {_some(saved_names)}; only the optimizer's has {_some(missing)}, only the saved "
            f"one {_some(unknown)}" + "".join(f"; {text}" for text in elsewhere[:3])
        )
    param_of = dict(zip(saved_names, group["params"], strict=True))
    return {**group, "params": [param_of[name] for name in names]}


def _is_in_our_order(own: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether torch has put a saved group's parameters into our order, but not their names.

    torch.distributed.checkpoint names parameters instead of counting them; FSDP1 counts ours.
    """
    return any(isinstance(index, str) for index in saved["params"]) or any(
        getattr(param, "_fsdp_flattened", False) for param in own["params"]
    )


def _some(names: Iterable[str]) -> str:
    quoted = sorted(map(repr, names))
    more = f" and {len(quoted) - 5} more" if len(quoted) > 5 else ""
    return (", ".join(quoted[:5]) or "nothing") + more


def _misfit(what: str) -> ValueError:
    return ValueError(f"the state_dict does not fit: {what}")


def clipping_in(groups: Sequence[Mapping[str, Any]], own: Clipping) -> Clipping:
    """The options of the whole optimizer in the groups of a state_dict.

    Args:
        groups: The groups.
        own: The optimizer's, which stay if the groups have none.

    Raises:
        ValueError: One is out of its range, or the groups differ.
    """
    found = {
        checked_clipping(*(group.get(name, value) for name, value in own._asdict().items()))
        for group in groups
    }
    if len(found) > 1:
        raise _misfit(f"its param_groups differ in options of the whole optimizer: {found}")
    return found.pop() if found else own


def saved_by_param(
    param_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> dict[Tensor, Any]:
    """The state in a state_dict, by the parameters that it will belong to.

    Args:
        param_groups: The optimizer's.
        state_dict: The state_dict that is to be loaded.

    Raises:
        ValueError: A tensor cannot be cast to its parameter's dtype and device, as torch will do.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    by_param = {}
    # torch raises if the lengths differ.
    for (name, _, param), index in zip(named_params(param_groups), saved, strict=False):
        by_param[param] = state_dict["state"].get(index, {})
        for role, tensor in by_param[param].items():
            if role in _ROLES and isinstance(tensor, Tensor):
                _check_kind(tensor, role, param, name)
    return by_param


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
        if "n_averaged" in of_param:
            of_param["n_averaged"] = STEP.plain("n_averaged", of_param["n_averaged"])
        for role, dtype in dtypes_of_state(group, param).items():
            if role in of_param:
                saved = unrounded.get(param, {}).get(role, of_param[role])
                _check_shape(saved, role, param, name)
                copied = saved.to(param.device, dtype, copy=True)
                of_param[role] = placed_like(param, copied)
        state[param] = of_param
    return {"state": state, "param_groups": groups}


def _adopted_group(i: int, own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    adopted = {key: value for key, value in saved.items() if key not in _NOT_OURS}
    adopted.setdefault("initial_lr", adopted.get("lr", own["initial_lr"]))
    group = {**own, **adopted}
    if isinstance(group["ema_decay"], str) and group["ema_decay"] == _FUNCTION:
        group["ema_decay"] = own["ema_decay"]
    try:
        group.update(plain_options(group))
        lr, is_ours = group["lr"], _is_ours(saved)
        if not is_ours or "scheduled_lr" not in saved:
            move_group(group, position_of(group))
        if is_ours:
            group["lr"] = lr
        group.update(check_group(group))
    except ValueError as error:
        raise _misfit(f"param_groups[{i}]: {error}") from error
    return group


def _check_kind(saved: Tensor, role: str, param: Tensor, name: str) -> None:
    is_dense = saved.layout == torch.strided and (param.is_meta or not saved.is_meta)
    if not is_dense or saved.is_complex() != param.is_complex():
        raise _misfit(
            f"{name} is of {param.dtype}, its {role} of {saved.dtype} and layout {saved.layout} on "
            f"{saved.device}"
        )


def _check_shape(saved: Any, role: str, param: Tensor, name: str) -> None:
    if not isinstance(saved, Tensor) or saved.shape != param.shape:
        found = tuple(saved.shape) if isinstance(saved, Tensor) else shown(saved)
        raise _misfit(
            f"{name} has shape {tuple(param.shape)}, its {role} {found}; was it saved from another "
            "model?"
        )
