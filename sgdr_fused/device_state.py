"""The part of a param group's state that is in the memory of its GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.groups import check_group, sync_group
from sgdr_fused.schedule import Position

__all__ = ["DeviceState", "host_copy", "sync_group_on_device", "sync_group_on_host", "to_host"]

# csrc/cuda/launcher.h, GroupMemory: 64-bit words, of which "lr" is a double and the last a ticket.
# What follows is a ParamState for each parameter, of one word: a byte for each of its tensors, and
# n_averaged in the upper half.
_WORDS = 7
_ROLES = ("momentum_buffer", "ema", "master_param")


class DeviceState:
    """Where a group's schedule stands, its LR and its first-step flags, as the kernel keeps them.

    A group whose parameters are on a GPU shows these in ``param_group["step"]``, ``["cycle"]``,
    ``["T_cur"]``, ``["T_i"]``, ``["lr"]`` and ``["skipped_steps"]``: tensors without dimensions, of
    which a read waits for the GPU. See Note [State on the GPU] in csrc/stepper_on_gpu.cpp.

    Args:
        memory: The memory, as int64.
        params: The group's parameters.

    Attributes:
        fields: The six tensors, by their names.
        is_empty: For each kind of tensor in the parameters' state, by its name, and each parameter:
            1 if the tensor holds nothing yet, else 0.
        n_averaged: For each parameter the number of weights in an equal average.
    """

    def __init__(self, memory: Tensor, params: Iterable[Any]) -> None:
        self.memory = memory
        self.params = list(params)
        self.fields = {name: memory[i] for i, name in enumerate(Position._fields)}
        self.fields["lr"] = memory.view(torch.float64)[len(Position._fields)]
        self.fields["skipped_steps"] = memory[len(Position._fields) + 1]
        flags = memory[_WORDS:].view(torch.uint8).view(-1, 8)
        self.is_empty = {role: flags[:, i] for i, role in enumerate(_ROLES)}
        self.n_averaged = memory[_WORDS:].view(torch.int32)[1::2]

    @classmethod
    def make(cls, group: MutableMapping[str, Any], state: Mapping[Tensor, Any]) -> DeviceState:
        """Brings a group that holds numbers to its parameters' GPU."""
        params = group["params"]
        _refuse_capture("the optimizer's state is to be brought to the GPU")
        with torch.inference_mode(False):
            memory = torch.zeros(_WORDS + len(params), dtype=torch.int64)
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
        """The one that a group shows; None if it holds numbers."""
        shown = group["step"]
        if not isinstance(shown, Tensor):
            return None
        memory = torch.empty(0, dtype=torch.int64, device=shown.device)
        return cls(memory.set_(shown.untyped_storage()), group["params"])

    def belongs_to(self, params: list[Any]) -> bool:
        """Whether these are the parameters that it was made for, and they are where it is."""
        return (
            len(params) == len(self.params)
            and all(mine is theirs for mine, theirs in zip(self.params, params, strict=True))
            and params[0].device == self.memory.device
        )

    def to_cpu(self) -> DeviceState:
        """A copy on the host."""
        _refuse_capture("the optimizer's state is to be read")
        return DeviceState(self.memory.cpu(), self.params)

    def numbers(self) -> dict[str, Any]:
        """The fields as numbers."""
        return {name: field.item() for name, field in self.fields.items()}

    def take_over(self, group: MutableMapping[str, Any]) -> None:
        """Writes what has been put into the group in place of a field."""
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
    lr_before: object,
    device_state: DeviceState | None,
    state: MutableMapping[Tensor, Any],
) -> DeviceState | None:
    """:func:`sync_group`, for a group that may be on a GPU, or have been.

    Args:
        group: A param group.
        lr_before: The object that ``lr`` was after the last step; None before the first.
        device_state: What this function gave for the group before.
        state: The optimizer's.

    Returns:
        Where the group's state is now; None: on the host.

    Raises:
        ValueError: An option is out of its range.
        RuntimeError: Something is to be written to the GPU while a CUDA graph is captured.
    """
    params = group["params"]
    if device_state is not None and not (params and device_state.belongs_to(params)):
        device_state.take_over(group)
        _to_host(group, device_state, state)
        device_state = None
    if device_state is not None:
        check_group(group)
        device_state.take_over(group)
        return device_state
    sync_group(group, lr_before)
    if params and isinstance(params[0], Tensor) and params[0].is_cuda:
        return DeviceState.make(group, state)
    return None


def sync_group_on_host(
    group: MutableMapping[str, Any], lr_before: object, _device_state: None, _state: object
) -> None:
    """:func:`sync_group` under the signature of :func:`sync_group_on_device`."""
    sync_group(group, lr_before)


def to_host(groups: Iterable[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any]) -> None:
    """Makes the groups hold numbers, and the state no buffer without content."""
    for group in groups:
        device_state = DeviceState.of(group)
        if device_state is not None:
            _to_host(group, device_state, state)


def host_copy(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, Any]]:
    """The same on a copy; the buffers are shared."""
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
    for i, param in enumerate(on_host.params):
        of_param = state.get(param)
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
            f"{what}, which cannot be part of a CUDA graph: a replay would not do it, or do it "
            "again; take one step, or call state_dict(), before the capture"
        )
