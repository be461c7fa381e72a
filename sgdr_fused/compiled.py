"""The step within torch.compile: the registered op, with the schedule's state in tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgdr_fused import native
from sgdr_fused.device_state import DeviceState
from sgdr_fused.groups import check_group, is_unchanged, kept_on_success, sync_group
from sgdr_fused.options import GROUP_OPTIONS, Clipping, Support
from sgdr_fused.tensors import check_tensors

__all__ = ["TracedStepper", "is_traceable", "step_groups"]

_BY_NAME = tuple(option.name for option in GROUP_OPTIONS if option.op is Support.BY_NAME)
_DEFAULT_ONLY = tuple(option for option in GROUP_OPTIONS if option.op is Support.DEFAULT_ONLY)
_OP_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_traceable(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the op can take the groups' step.

    Args:
        param_groups: The optimizer's.
    """
    return native.extension is not None and all(map(_is_traceable_group, param_groups))


def _is_traceable_group(group: Mapping[str, Any]) -> bool:
    return all(group[option.name] == option.default for option in _DEFAULT_ONLY) and all(
        _is_traceable_tensor(param) for param in group["params"]
    )


def _is_traceable_tensor(param: Tensor) -> bool:
    grad = param.grad
    return all(
        tensor is None
        or (
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.dtype in _OP_DTYPES
            and tensor.layout == torch.strided
        )
        for tensor in (param, grad)
    )


def step_groups(
    param_groups: Sequence[Mapping[str, Any]],
    tensors: Sequence[Sequence[Tensor]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Calls the op for each group.

    Args:
        param_groups: The optimizer's.
        tensors: Result of :meth:`TracedStepper.collect`: params, grads, momentum buffers of all
            groups, and each group's memory.
        grad_scale: The factor that the gradients were multiplied by, of one element; None: 1.
        found_inf: A tensor of one element; if it is not 0, the step is skipped.
    """
    params, grads, momentum_buffers, memories = tensors
    first = first_buffer = 0
    for group, memory in zip(param_groups, memories, strict=True):
        indices = [i for i, param in enumerate(group["params"]) if param.grad is not None]
        last = first + len(indices)
        last_buffer = first_buffer + (len(indices) if group["momentum"] != 0 else 0)
        by_epoch = group["anneal"] == "epoch"
        torch.ops.sgdr_fused.fused_step_(
            params[first:last],
            grads[first:last],
            momentum_buffers[first_buffer:last_buffer],
            memory,
            indices,
            grad_scale=grad_scale,
            found_inf=found_inf,
            eta_max=group["initial_lr"],
            T_0=group["T_0"] * group["steps_per_epoch"],
            anneal_every=group["steps_per_epoch"] if by_epoch else 1,
            **{name: group[name] for name in _BY_NAME},
        )
        first, first_buffer = last, last_buffer


def guard_identity(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Makes torch.compile guard which tensors the groups hold, not their dtype and shape alone.

    Args:
        param_groups: The optimizer's.
    """
    for group in param_groups:
        for value in (*group["params"], *group.values()):
            if isinstance(value, Tensor):
                torch._dynamo.mark_static_address(value, guard=True)


class TracedStepper:
    """The steps of one optimizer once torch.compile has traced one.

    It keeps the schedules' positions and the LRs in tensors, as on a GPU, so that a graph of
    torch.compile and an eager step see each other's changes.

    Args:
        check_groups: Raises for what is no param group.

    Attributes:
        grad_norm: None: the op computes no norm.
        needs_norm: Whether an option needs the norm, so that the op cannot take the step.
    """

    grad_norm = None

    def __init__(self, check_groups: Callable[[Sequence[MutableMapping[str, Any]]], None]) -> None:
        self._check_groups = check_groups
        self.needs_norm = False
        self._states: list[DeviceState | None] = []
        self._groups_before: list[dict[str, Any]] = []

    def set_clipping(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        """Sets the options of :class:`~sgdr_fused.options.Clipping`."""
        self.needs_norm = Clipping(max_grad_norm, skip_nonfinite).needs_norm

    def step(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: float | Tensor | None,
        found_inf: float | Tensor | None,
    ) -> bool:
        """The step outside of a graph, by the same op.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.
            grad_scale: The factor that the gradients were multiplied by; None: 1.
            found_inf: If it is not 0, the step is skipped.

        Returns:
            False if the op cannot take this step; nothing was written.

        Raises:
            ValueError: As in :meth:`collect`.
            RuntimeError: As in :meth:`collect`.
        """
        if self.needs_norm or not is_traceable(param_groups):
            return False
        with torch.no_grad():
            tensors = self.collect(param_groups, state)
            step_groups(param_groups, tensors, _to_tensor(grad_scale), _to_tensor(found_inf))
        return True

    def step_param(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        index: int,
    ) -> bool:
        """False: the op cannot update a single parameter."""
        return False

    def sync(
        self, param_groups: Sequence[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any]
    ) -> None:
        """Applies changes of the groups since the last call.

        Raises:
            ValueError: An option is out of its range.
        """
        self._check_groups(param_groups)
        del self._states[len(param_groups) :], self._groups_before[len(param_groups) :]
        self._states += [None] * (len(param_groups) - len(self._states))
        self._groups_before += [{}] * (len(param_groups) - len(self._groups_before))
        with kept_on_success(param_groups):
            for i, group in enumerate(param_groups):
                before = self._groups_before[i]
                if is_unchanged(group, before):
                    continue
                self._sync_group(i, group, state)
                self._groups_before[i] = dict(group)

    def _sync_group(
        self,
        i: int,
        group: MutableMapping[str, Any],
        state: MutableMapping[Tensor, Any],
    ) -> None:
        device_state = self._state_in_tensors(i, group)
        if device_state is None:
            sync_group(group)
            self._states[i] = DeviceState.make(group, state)
            return
        self._states[i] = device_state
        group.update(check_group(group, is_on_gpu=True))
        device_state.write_changes_of(group)
        # An option of the schedule may have changed, so the LR is computed anew.
        numbers = dict(group) | device_state.numbers()
        sync_group(numbers)
        for name in ("lr", "scheduled_lr"):
            device_state.fields[name].fill_(numbers[name])

    def _state_in_tensors(self, i: int, group: MutableMapping[str, Any]) -> DeviceState | None:
        """The tensors that hold the group's state; None, and numbers in the group, if none fit.

        They are this stepper's own, or another stepper has put them into the group.
        """
        found = (self._states[i], DeviceState.of(group))
        for device_state in found:
            if device_state and group["params"] and device_state.belongs_to(group["params"]):
                return device_state
        if found[1] is not None:
            group.update(found[1].numbers())
        return None

    def collect(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The tensors of the next step: params, grads, momentum buffers, and each group's memory.

        Raises:
            ValueError: An option, gradient or buffer is not valid.
            RuntimeError: A gradient is sparse, or a parameter overlaps itself.
        """
        check_tensors(param_groups, state)
        self.sync(param_groups, state)
        params, grads, buffers, memories = [], [], [], []
        for group, device_state in zip(param_groups, self._states, strict=True):
            assert device_state is not None
            is_empty = device_state.is_empty["momentum_buffer"]
            for i, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                params.append(param)
                grads.append(param.grad)
                if group["momentum"] == 0:
                    continue
                of_param = state.setdefault(param, {})
                buffer = of_param.get("momentum_buffer")
                if buffer is None:
                    with torch.no_grad():
                        buffer = of_param["momentum_buffer"] = torch.zeros_like(param)
                    is_empty[i] = 1
                buffers.append(buffer)
            memories.append(device_state.memory)
        return params, grads, buffers, memories


def _to_tensor(value: float | Tensor | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device="cpu")
