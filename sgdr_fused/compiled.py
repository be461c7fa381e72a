"""The step within torch.compile: the registered op, on state that is in tensors."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgdr_fused import native
from sgdr_fused.device_state import DeviceState
from sgdr_fused.groups import check_group, is_unchanged, sync_group
from sgdr_fused.reference import Clipping
from sgdr_fused.tensors import check_tensors

__all__ = ["TracedStepper", "is_traceable", "step_groups"]

_OP_OPTIONS = (
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "decoupled_weight_decay",
    "reset_momentum",
)
_OP_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_traceable(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the op knows all that the groups ask for.

    Args:
        param_groups: The optimizer's.
    """
    return native.extension is not None and all(map(_is_traceable_group, param_groups))


def _is_traceable_group(group: Mapping[str, Any]) -> bool:
    return (
        group["ema_decay"] is None
        and group["momentum_dtype"] is None
        and not group["stochastic_rounding"]
        and not group["master_weights"]
        and all(_is_traceable_tensor(param) for param in group["params"])
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
    """The step of all groups by the op.

    Args:
        param_groups: The optimizer's.
        tensors: What :meth:`TracedStepper.collect` gave: params, grads, momentum buffers of all
            groups, and each group's memory.
        grad_scale: What the gradients were multiplied by, of one element; None: by nothing.
        found_inf: Of one element; not 0: the step is skipped.
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
            eta_min=group["eta_min"],
            T_mult=group["T_mult"],
            cycle_decay=group["cycle_decay"],
            warmup_start_lr=group["warmup_start_lr"],
            T_0=group["T_0"] * group["steps_per_epoch"],
            anneal_every=group["steps_per_epoch"] if by_epoch else 1,
            warmup_steps=group["warmup_steps"],
            n_cycles=group["n_cycles"],
            **{name: group[name] for name in _OP_OPTIONS},
        )
        first, first_buffer = last, last_buffer


class TracedStepper:
    """Stands where the native extension's ``Stepper`` stands once a step has been traced.

    The schedules' positions and the LRs are then in tensors, as they are on a GPU: what a graph of
    torch.compile writes, an eager step has to find, and the other way round.

    Attributes:
        grad_norm: None: the op takes no norm.
        clips: Whether a norm is asked for, which the op does not take.
    """

    grad_norm = None

    def __init__(self) -> None:
        self.clips = False
        self._states: list[DeviceState | None] = []
        self._groups_before: list[dict[str, Any]] = []

    def set_clipping(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        """Sets the options that the op does not know: see :class:`Clipping`."""
        self.clips = Clipping(max_grad_norm, skip_nonfinite).needs_norm

    def step(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: float | Tensor | None,
        found_inf: float | Tensor | None,
    ) -> bool:
        """The step outside of a graph.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.
            grad_scale: What the gradients were multiplied by; None: by nothing.
            found_inf: Not 0: the step is skipped.

        Returns:
            False, having written nothing, where the op does not know all that is asked for.

        Raises:
            ValueError: As for :meth:`collect`.
            RuntimeError: As for :meth:`collect`.
        """
        if self.clips or not is_traceable(param_groups):
            return False
        with torch.no_grad():
            tensors = self.collect(param_groups, state)
            step_groups(param_groups, tensors, _to_tensor(grad_scale), _to_tensor(found_inf))
        return True

    def step_param(self, *_: object) -> bool:
        """False: the op takes the step of a whole group."""
        return False

    def sync(
        self, param_groups: Sequence[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any]
    ) -> None:
        """Takes over what has changed in the groups since they were last seen.

        Raises:
            ValueError: An option is out of its range.
        """
        del self._states[len(param_groups) :], self._groups_before[len(param_groups) :]
        self._states += [None] * (len(param_groups) - len(self._states))
        self._groups_before += [{}] * (len(param_groups) - len(self._groups_before))
        for i, group in enumerate(param_groups):
            before = self._groups_before[i]
            if is_unchanged(group, before):
                continue
            self._sync_group(i, group, before, state)
            self._groups_before[i] = dict(group)

    def _sync_group(
        self,
        i: int,
        group: MutableMapping[str, Any],
        before: Mapping[str, Any],
        state: MutableMapping[Tensor, Any],
    ) -> None:
        device_state = self._states[i]
        params = group["params"]
        if device_state is None or not params or not device_state.belongs_to(params):
            shown = DeviceState.of(group)
            if shown is not None and params and shown.belongs_to(params):
                device_state = shown
            else:
                if shown is not None:
                    group.update(shown.numbers())
                sync_group(group, before.get("lr"))
                self._states[i] = DeviceState.make(group, state)
                return
        self._states[i] = device_state
        check_group(group)
        lr_is_by_hand = group["lr"] is not before.get("lr")
        device_state.take_over(group)
        if before and not lr_is_by_hand:
            numbers = dict(group) | device_state.numbers()
            sync_group(numbers, numbers["lr"])
            device_state.fields["lr"].fill_(numbers["lr"])

    def collect(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The tensors of the next step: params, grads, momentum buffers, each group's memory.

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
                buffer = state[param].get("momentum_buffer")
                if buffer is None:
                    with torch.no_grad():
                        buffer = state[param]["momentum_buffer"] = torch.zeros_like(param)
                    is_empty[i] = 1
                buffers.append(buffer)
            memories.append(device_state.memory)
        return params, grads, buffers, memories


def _to_tensor(value: float | Tensor | None) -> Tensor | None:
    return value if value is None else torch.as_tensor(value)
