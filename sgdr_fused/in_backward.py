"""Updates within backward(), one parameter at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakMethod, finalize, ref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sgdr_fused.groups import check_groups
from sgdr_fused.in_backward_checks import (
    name_of,
    refuse_flat_params,
    refuse_gradients,
    refuse_late_changes,
    refuse_scaled_step,
    refuse_shared_memory,
)

__all__ = ["StepInBackward"]


class StepInBackward:
    """The hooks that update each parameter as soon as its gradient is complete.

    See :meth:`~sgdr_fused.FusedSGDR.step_in_backward`. Neither the hooks nor this handle keep the
    optimizer or a parameter alive; when the optimizer is gone, so are the hooks.

    Args:
        optimizer: The optimizer. Its parameters may change: each step gives hooks to new ones, and
            removes those of the ones that have left.
        step_param: A method of the optimizer that updates one parameter, given its index over all
            groups.

    Raises:
        RuntimeError: The updates would be wrong; the message says why.
    """

    def __init__(self, optimizer: Optimizer, step_param: Callable[[int], None]) -> None:
        self._optimizer = ref(optimizer)
        self._step_param = WeakMethod(step_param)
        self._places: dict[int, tuple[int, int]] = {}
        self._addresses: list[int] = []
        self._updated: set[int] = set()  # ids of the parameters updated since the last step()
        self._saw_backward = False

        check_groups(optimizer.param_groups)
        params = list(_params(optimizer.param_groups))
        refuse_late_changes(params)
        refuse_gradients(optimizer.param_groups, params)
        # By the parameter's id: torch.utils.swap_tensors() refuses tensors with weak references.
        self._hooks: dict[int, RemovableHandle] = {}
        self._follow(optimizer.param_groups, params)
        handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._finalizer = finalize(optimizer, _remove, self._hooks, handles)
        self._finalizer.atexit = False

    @property
    def is_active(self) -> bool:
        """Whether the hooks are registered, until :meth:`remove` or the end of the optimizer."""
        return self._finalizer.alive

    def remove(self) -> None:
        """Leaves the updates to :meth:`~sgdr_fused.FusedSGDR.step` again."""
        self._finalizer()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self, param: Tensor) -> None:
        """The hook of every parameter."""
        optimizer, step_param = self._optimizer(), self._step_param()
        if optimizer is None or step_param is None:
            return
        index = self._index(optimizer.param_groups, param)
        if index is None:
            return
        try:
            self._check_gradient(optimizer.param_groups, param)
            step_param(index)
            self._updated.add(id(param))
        finally:
            # After an error too: the next gradient must not be added to this one.
            param.grad = None

    def _check_gradient(self, param_groups: Sequence[Mapping[str, Any]], param: Tensor) -> None:
        if not self._saw_backward:
            refuse_late_changes(_params(param_groups))
            self._saw_backward = True
        if id(param) in self._updated:
            raise RuntimeError(
                f"{name_of(param_groups, param)} got a second gradient since the last step(), but "
                "step_in_backward() has updated it by the first one, so they cannot be added up; "
                "call step() after each backward(). To accumulate gradients, remove() the handle. "
                "If the loss of another model reaches this parameter, call backward(inputs=...) "
                "with the parameters that the loss is for. Reentrant checkpoints that share a "
                "layer need use_reentrant=False"
            )

    def _index(self, param_groups: Sequence[Mapping[str, Any]], param: Tensor) -> int | None:
        """The parameter's index over all groups; None if it has left them."""
        place = self._places.get(id(param))
        if place is None or not _is_at(param_groups, place, param):
            self._places = {
                id(other): (i, j)
                for i, group in enumerate(param_groups)
                if _is_listed(group)
                for j, other in enumerate(group["params"])
            }
            place = self._places.get(id(param))
            if place is None:
                return None
        group, index = place
        for before in param_groups[:group]:
            if not _is_listed(before):
                return None
            index += len(before["params"])
        return index

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        check_groups(optimizer.param_groups)
        refuse_scaled_step(optimizer)
        params = list(_params(optimizer.param_groups))
        for param in params:
            if param.grad is not None and id(param) in self._updated:
                raise RuntimeError(
                    f"{name_of(optimizer.param_groups, param)} has a gradient again after its "
                    "update within backward(), as from DistributedDataParallel, which "
                    "step_in_backward() cannot work with; remove() the handle"
                )
        self._follow(optimizer.param_groups, params)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        self._updated.clear()
        # A user of step_in_backward() calls no zero_grad().
        for param in _params(optimizer.param_groups):
            param.grad = None

    def _after_load(self, *_: object) -> None:
        self._updated.clear()

    def _follow(self, param_groups: Sequence[Mapping[str, Any]], params: list[Tensor]) -> None:
        """Gives the groups' parameters hooks, and takes them from those that have left."""
        trainable = {id(p): p for p in params if p.requires_grad and p.is_leaf}
        for key in self._hooks.keys() - trainable.keys():
            self._hooks.pop(key).remove()
        new = [p for p in trainable.values() if self not in _owners_of_hooks(p)]
        addresses = [p.data_ptr() if type(p) in (Tensor, Parameter) else 0 for p in params]
        if addresses != self._addresses:
            refuse_shared_memory(param_groups, params)
            self._addresses = addresses
        refuse_flat_params(param_groups, new)
        self._refuse_other_optimizer(param_groups, new)
        for param in new:
            self._hooks[id(param)] = param.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]

    def _refuse_other_optimizer(
        self, param_groups: Sequence[Mapping[str, Any]], params: list[Tensor]
    ) -> None:
        if any(map(_owners_of_hooks, params)):
            gc.collect()  # the other optimizer may be garbage
        for param in params:
            if _owners_of_hooks(param):
                raise RuntimeError(
                    f"step_in_backward() of another optimizer updates "
                    f"{name_of(param_groups, param)} already; remove() its handle first"
                )


def _remove(hooks: dict[int, RemovableHandle], of_optimizer: list[RemovableHandle]) -> None:
    for handle in (*hooks.values(), *of_optimizer):
        handle.remove()
    hooks.clear()


def _owners_of_hooks(param: Tensor) -> list[StepInBackward]:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, StepInBackward)]


def _is_listed(group: object) -> bool:
    """Whether the group is as step() leaves it; it checks, and lists, what the user has written."""
    return isinstance(group, dict) and isinstance(group.get("params"), list)


def _params(param_groups: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
    for group in filter(_is_listed, param_groups):
        for param in group["params"]:
            if isinstance(param, Tensor):
                yield param


def _is_at(
    param_groups: Sequence[Mapping[str, Any]], place: tuple[int, int], param: Tensor
) -> bool:
    i, j = place
    if i >= len(param_groups) or not _is_listed(param_groups[i]):
        return False
    params = param_groups[i]["params"]
    return j < len(params) and params[j] is param
