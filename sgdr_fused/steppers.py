"""The three ways to take a step, and how one of them is chosen.

The native extension's ``Stepper`` takes every step that it can. The reference takes the others, or
all of them with ``backend="reference"``. :class:`~sgdr_fused.compiled.TracedStepper` takes over
where torch.compile traces a step, because a graph needs the schedule's state in tensors.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any, Protocol

from torch import Tensor

from sgdr_fused import native
from sgdr_fused.compiled import TracedStepper, is_traceable
from sgdr_fused.device_state import sync_group_on_device, sync_group_on_host, to_host
from sgdr_fused.noted_groups import NotedGroups
from sgdr_fused.options import Backend, Clipping, plain_option
from sgdr_fused.reference import ReferenceStepper
from sgdr_fused.shards import local_tensor, shard_axes, sum_over_shards
from sgdr_fused.tensors import check_tensors, kinds_of_tensors

__all__ = [
    "Stepper",
    "checked_backend",
    "new_lock",
    "new_stepper",
    "stepper_after_refusal",
    "traced_stepper",
]

_SLOWER = (
    "FusedSGDR steps in plain PyTorch, several times slower than torch.optim.SGD with a scheduler: "
)


class Stepper(Protocol):
    """What takes the steps of one optimizer.

    It remembers the groups of the last call, so that a step only looks at what has changed. All
    methods get the optimizer's own ``param_groups`` and ``state``.
    """

    @property
    def grad_norm(self) -> Tensor | float | None:
        """Norm of all gradients at the last step, before clipping; None if not needed."""

    def set_clipping(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        """Sets the options of :class:`~sgdr_fused.options.Clipping`."""

    def sync(
        self, param_groups: Sequence[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any]
    ) -> None:
        """Applies changes of the groups since the last call."""

    def step(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: float | Tensor | None,
        found_inf: float | Tensor | None,
    ) -> bool:
        """Takes the whole step; False if it cannot take this one, and has written nothing."""

    def step_param(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        index: int,
    ) -> bool:
        """Updates the parameter of that index over all groups; False as for :meth:`step`."""


def checked_backend(backend: object) -> Backend:
    """The backend, if it exists and is available.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It is ``"native"``, and there is no native extension.
    """
    checked: Backend = plain_option("backend", backend)
    if checked == "native" and native.extension is None:
        raise RuntimeError(f'backend="native" is not available: {native.why_missing}')
    return checked


def new_lock() -> AbstractContextManager[Any]:
    """A lock that lets one thread at a time into an optimizer.

    The native stepper takes it itself, because Python's own would cost a small step a twentieth.
    """
    lock: AbstractContextManager[Any]
    lock = RLock() if native.extension is None else native.extension.StepLock()
    return lock


def new_stepper(
    backend: Backend,
    clipping: Clipping,
    lock: AbstractContextManager[Any],
    check_groups: NotedGroups,
) -> Stepper:
    """The native stepper; the reference if it is asked for, or without the native extension."""
    stepper: Stepper
    if backend == "reference":
        stepper = ReferenceStepper(lock, check_groups)
    elif native.extension is None:
        stepper = ReferenceStepper(lock, check_groups, _SLOWER + native.why_missing)
    else:
        sync_group = sync_group_on_device if native.extension.has_cuda else sync_group_on_host
        stepper = native.extension.Stepper(
            lock, check_groups, sync_group, local_tensor, shard_axes, sum_over_shards
        )
    stepper.set_clipping(*clipping)
    return stepper


def stepper_after_refusal(
    stepper: Stepper,
    backend: Backend,
    clipping: Clipping,
    lock: AbstractContextManager[Any],
    check_groups: NotedGroups,
    param_groups: Sequence[MutableMapping[str, Any]],
    state: MutableMapping[Tensor, Any],
) -> Stepper:
    """The stepper to go on with after one could not take a step.

    After :class:`~sgdr_fused.compiled.TracedStepper` it is a new one, after the native one the
    reference.

    Args:
        stepper: The one that returned False.
        backend: Which backend the user wants.
        clipping: Options of the whole optimizer.
        lock: The optimizer's.
        check_groups: The optimizer's.
        param_groups: The optimizer's; moved to the host.
        state: The optimizer's; moved to the host.

    Raises:
        ValueError: A tensor is not valid, so that no stepper could take the step.
        RuntimeError: The same, or ``backend="native"`` does not allow the reference.
    """
    if isinstance(stepper, TracedStepper):
        to_host(param_groups, state)
        return new_stepper(backend, clipping, lock, check_groups)
    check_groups(param_groups)
    check_tensors(param_groups, state)
    reason = (
        "the native step does not take a device, dtype or tensor subclass in use: "
        + kinds_of_tensors(param_groups)
    )
    if _are_on_gpu(param_groups) and not native.extension.has_cuda:
        reason = f"the native backend is built without CUDA; {native.HOW_TO_BUILD}"
    if backend == "native":
        raise RuntimeError(f'backend="native" cannot take this step: {reason}')
    to_host(param_groups, state)
    reference = ReferenceStepper(lock, check_groups, _SLOWER + reason)
    reference.set_clipping(*clipping)
    return reference


def _are_on_gpu(param_groups: Sequence[MutableMapping[str, Any]]) -> bool:
    return any(param.is_cuda for group in param_groups for param in group["params"])


def traced_stepper(
    stepper: Stepper,
    check_groups: NotedGroups,
    param_groups: Sequence[MutableMapping[str, Any]],
) -> TracedStepper | None:
    """The stepper for a step that torch.compile traces; None if the groups' step cannot be traced.

    Args:
        stepper: The current one, kept if it is the right one.
        check_groups: The optimizer's.
        param_groups: The optimizer's.
    """
    if not is_traceable(param_groups):
        return None
    return stepper if isinstance(stepper, TracedStepper) else TracedStepper(check_groups)
