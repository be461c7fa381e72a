"""The reference behind the interface that FusedSGDR steps with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.groups import kept_on_success, sync_group
from sgdr_fused.options import Clipping
from sgdr_fused.reference.step import count_skipped, reference_step, update_params
from sgdr_fused.tensors import check_tensors

__all__ = ["ReferenceStepper"]


class ReferenceStepper:
    """The steps of one optimizer, in the place of the native extension's ``Stepper``.

    Args:
        lock: Lets one thread at a time into the optimizer.
        check_groups: Raises for what is no param group.
        warning: A warning to give at the first step; empty: none.

    Attributes:
        grad_norm: Norm of the gradients at the last step, before clipping; None if not needed.
    """

    def __init__(
        self,
        lock: AbstractContextManager[Any],
        check_groups: Callable[[Sequence[MutableMapping[str, Any]]], None],
        warning: str = "",
    ) -> None:
        self._lock = lock
        self._check_groups = check_groups
        self._warning = warning
        self._clipping = Clipping()
        self.grad_norm: float | None = None

    def set_clipping(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        """Sets the options of :class:`~sgdr_fused.options.Clipping`."""
        self._clipping = Clipping(max_grad_norm, skip_nonfinite)
        if not self._clipping.needs_norm:
            self.grad_norm = None

    def sync(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
    ) -> None:
        """Applies changes of the groups since the last call.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.

        Raises:
            ValueError: An option is out of its range.
            TypeError: The groups or the state are no such thing.
        """
        with self._synced(param_groups, state):
            pass

    # torch.compile of torch 2.11 would trace this at a graph break, and then round add(alpha=...)
    # twice.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: float | Tensor | None,
        found_inf: float | Tensor | None,
    ) -> bool:
        """Updates all parameters that have a gradient, then the schedule.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.
            grad_scale: The factor that the gradients were multiplied by; None: 1.
            found_inf: If it is not 0, the step is skipped.

        Returns:
            True: the reference can take every step.

        Raises:
            ValueError: An option, gradient or buffer is not valid; nothing was written.
            RuntimeError: A gradient is sparse or a parameter overlaps itself; nothing was written.
        """
        with self._synced(param_groups, state):
            if found_inf is not None and float(found_inf) != 0:
                count_skipped(param_groups)
                return True
            if self._warning:
                warnings.warn(self._warning, stacklevel=_frames_to_caller())
                self._warning = ""
            scale = 1.0 if grad_scale is None else float(grad_scale)
            self.grad_norm = reference_step(param_groups, state, scale, self._clipping)
        return True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step_param(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        index: int,
    ) -> bool:
        """Updates one parameter; the schedule stays.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's.
            index: The parameter's index over all groups.

        Returns:
            True, as for :meth:`step`.

        Raises:
            ValueError: As for :meth:`step`.
            RuntimeError: As for :meth:`step`.
        """
        with self._synced(param_groups, state), torch.no_grad():
            check_tensors(param_groups, state, only=index)
            update_params(param_groups, state, only=index)
        return True

    @contextmanager
    def _synced(
        self,
        param_groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
    ) -> Iterator[None]:
        """Syncs the groups, which an error within the ``with`` block puts back."""
        with self._lock:
            self._check_groups(param_groups)
            if not isinstance(state, dict):
                raise TypeError(
                    f"optimizer.state is of type {type(state).__name__}, but must be a dict"
                )
            with kept_on_success(param_groups):
                for group in param_groups:
                    sync_group(group)
                yield


def _frames_to_caller() -> int:
    """The stacklevel with which a warning points at the code that called ``step()``."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(
        ("sgdr_fused.", "torch.")
    ):
        frame, level = frame.f_back, level + 1
    return level
