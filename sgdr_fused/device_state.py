"""The part of a param group's state that is kept in the memory of its GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sgdr_fused import native
from sgdr_fused.ema_schedule import evaluate_ema_decay
from sgdr_fused.groups import check_group, drop_momentum, move_group, sync_group
from sgdr_fused.schedule import Position

__all__ = [
    "DeviceState",
    "host_copy",
    "restart_group",
    "sync_group_on_device",
    "sync_group_on_host",
    "to_host",
]

# The layout of the C++ struct GroupMemory in 64-bit words: the Position, "lr" and "scheduled_lr" as
# doubles, "skipped_steps" and eight words of the kernel's own. One word for each parameter follows,
# the C++ struct ParamState: a byte for each role, and n_averaged in the upper half.
_WORDS = 15
_ROLES = ("momentum_buffer", "ema", "master_param")


class DeviceState:
    """A group's place in its schedule, its LR and its first-step flags, as the kernel keeps them.

    A group whose parameters are on a GPU has views of this memory as ``param_group["step"]``,
    ``["cycle"]``, ``["T_cur"]``, ``["T_i"]``, ``["lr"]``, ``["scheduled_lr"]`` and
    ``["skipped_steps"]``: 0-dim tensors, and reading one synchronizes. See Note [State on the GPU]
    in csrc/python/group_on_gpu.h.

    Args:
        memory: The memory, of dtype int64.
        params: The group's parameters.

    Attributes:
        fields: The seven 0-dim tensors, by name.
        is_empty: uint8 tensors by role ("momentum_buffer", "ema", "master_param"), one element for
            each parameter: 1 while the parameter's tensor of that role has no value yet, else 0.
        n_averaged: int32 tensor: the number of weights in each parameter's equal average.
    """

    def __init__(self, memory: Tensor, params: Iterable[Any]) -> None:
        self.memory = memory
        # They do not keep parameters alive that the user has dropped.
        self._ids = [id(param) for param in params]
        self.fields = {name: memory[i] for i, name in enumerate(Position._fields)}
        self.fields["lr"] = memory.view(torch.float64)[len(Position._fields)]
        self.fields["scheduled_lr"] = memory.view(torch.float64)[len(Position._fields) + 1]
        self.fields["skipped_steps"] = memory[len(Position._fields) + 2]
        flags = memory[_WORDS:].view(torch.uint8).view(-1, 8)
        self.is_empty = {role: flags[:, i] for i, role in enumerate(_ROLES)}
        self.n_averaged = memory[_WORDS:].view(torch.int32)[1::2]

    @classmethod
    def make(cls, group: MutableMapping[str, Any], state: Mapping[Tensor, Any]) -> DeviceState:
        """Moves the numbers of a group to its parameters' GPU."""
        params = group["params"]
        _refuse_capture("the optimizer's state has to move to the GPU")
        with torch.inference_mode(False):
            memory = torch.zeros(_WORDS + len(params), dtype=torch.int64, device="cpu")
            on_host = cls(memory, params)
            for name, field in on_host.fields.items():
                field.fill_(group[name])
            for i, param in enumerate(params):
                of_param = state.get(param, {})
                for role in _ROLES:
                    on_host.is_empty[role][i] = of_param.get(role) is None
                on_host.n_averaged[i] = of_param.get("n_averaged") or 0
            on_device = cls(memory.to(params[0].device), params)
        group.update(on_device.fields)
        return on_device

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> DeviceState | None:
        """The state behind a group's tensors; None if the group holds numbers."""
        shown = group["step"]
        if not isinstance(shown, Tensor):
            return None
        memory = torch.empty(0, dtype=torch.int64, device=shown.device)
        return cls(memory.set_(shown.untyped_storage()), group["params"])

    def belongs_to(self, params: list[Any]) -> bool:
        """Whether it was made for these parameters, and they still are on its device."""
        return [id(param) for param in params] == self._ids and params[
            0
        ].device == self.memory.device

    def to_cpu(self) -> DeviceState:
        """A copy on the host; synchronizes."""
        _refuse_capture("the optimizer's state has to be read")
        copy = DeviceState(self.memory.cpu(), ())
        copy._ids = self._ids
        return copy

    def numbers(self) -> dict[str, Any]:
        """The fields as Python numbers; synchronizes for a GPU."""
        return {name: field.item() for name, field in self.fields.items()}

    def write_changes_of(self, group: MutableMapping[str, Any]) -> None:
        """Writes values that the user has set in the group into the fields that they replaced."""
        for name, field in self.fields.items():
            value = group[name]
            if value is field:
                continue
            _refuse_capture(f'param_group["{name}"] was set since the last step')
            if isinstance(value, Tensor) and value.is_cuda:
                field.copy_(value.reshape(()))
            else:
                field.fill_(value.item() if isinstance(value, Tensor) else value)
            group[name] = field


def sync_group_on_device(
    group: MutableMapping[str, Any],
    device_state: DeviceState | None,
    state: MutableMapping[Tensor, Any],
) -> DeviceState | None:
    """:func:`sync_group` for a group that is, or was, on a GPU or on the host.

    Args:
        group: A param group.
        device_state: This function's last result for the group.
        state: The optimizer's.

    Returns:
        The group's state on its GPU; None: it is on the host.

    Raises:
        ValueError: An option is out of its range.
        RuntimeError: The GPU's memory has to be written while a CUDA graph is captured, or there
            is no code for the GPU.
    """
    params = group["params"]
    if device_state is not None and not (params and device_state.belongs_to(params)):
        device_state.write_changes_of(group)
        _to_host(group, device_state, state)
        device_state = None
    if device_state is not None:
        group.update(check_group(group, is_on_gpu=True))
        device_state.write_changes_of(group)
        if callable(group["ema_decay"]):
            _refuse_capture("ema_decay is a function, which the host evaluates for each step")
            evaluate_ema_decay(group)
        return device_state
    sync_group(group)
    if params and isinstance(params[0], Tensor) and params[0].is_cuda:
        native.check_gpu(params[0].device)
        return DeviceState.make(group, state)
    return None


def sync_group_on_host(
    group: MutableMapping[str, Any], _device_state: None, _state: object
) -> None:
    """:func:`sync_group` with the signature of :func:`sync_group_on_device`."""
    sync_group(group)


def restart_group(
    group: MutableMapping[str, Any], start: Position, state: MutableMapping[Tensor, Any]
) -> None:
    """Moves a group to the start of a cycle, and drops its momentum if ``reset_momentum`` is set.

    Args:
        group: A param group.
        start: The position at the start of the cycle.
        state: The optimizer's.
    """
    device_state = DeviceState.of(group)
    move_group(group, start)
    if not group["reset_momentum"]:
        return
    if device_state is None:
        drop_momentum(group, state)
    else:
        device_state.is_empty["momentum_buffer"].fill_(1)


def to_host(groups: Iterable[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any]) -> None:
    """Gives the groups numbers for tensors, and removes state tensors that have no value yet."""
    for group in groups:
        device_state = DeviceState.of(group)
        if device_state is not None:
            _to_host(group, device_state, state)


def host_copy(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, Any]]:
    """Copies of the groups and the state, as :func:`to_host` makes them; tensors are shared."""
    copies = [dict(group) for group in groups]
    copied_state = defaultdict(dict, {key: dict(value) for key, value in state.items()})
    to_host(copies, copied_state)
    return copies, copied_state


def _to_host(
    group: MutableMapping[str, Any],
    device_state: DeviceState,
    state: MutableMapping[Tensor, Any],
) -> None:
    on_host = device_state.to_cpu()
    group.update(on_host.numbers())
    by_id = {id(param): of_param for param, of_param in state.items()}
    for i, param_id in enumerate(on_host._ids):
        of_param = by_id.get(param_id)
        if of_param is None:
            continue
        for role in _ROLES:
            if on_host.is_empty[role][i]:
                of_param.pop(role, None)
        if "ema" in of_param and group["ema_decay"] == "swa":
            of_param["n_averaged"] = int(on_host.n_averaged[i])


def _refuse_capture(what: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what}, which cannot be part of a CUDA graph: a replay would not do it, or would do "
            "it again; take one step, or call state_dict(), before the capture"
        )
