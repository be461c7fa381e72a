"""A hook that is called when a cycle ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sgdr_fused.groups import index_of_group, position_of
from sgdr_fused.values import shown

__all__ = ["RestartHook"]


class RestartHook:
    """A registered hook; :meth:`remove` or the end of a ``with`` block unregisters it.

    See :meth:`~sgdr_fused.FusedSGDR.register_restart_hook`.

    Args:
        optimizer: The optimizer whose cycles end, and the hook's argument.
        hook: The function to call.
        group: Index of the param group whose cycles count.
        registered: The optimizer's hooks, this one among them until it is removed. The optimizer
            calls their :meth:`after_restart`.

    Raises:
        TypeError: The hook is not callable.
        ValueError: ``group`` is not an integer.
        IndexError: There is no such group.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hook: Callable[[Any], object],
        group: int,
        registered: list[RestartHook],
    ) -> None:
        if not callable(hook):
            raise TypeError(f"hook must be callable, but is {shown(hook)}")
        self._hook = hook
        # An index from the front stays right when a group is added.
        self._index = index_of_group(optimizer.param_groups, group)
        self._optimizer = optimizer
        self._step_before: Any = None
        self._step_hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        self._registered = registered
        registered.append(self)

    def remove(self) -> None:
        """Unregisters the hook."""
        for step_hook in self._step_hooks:
            step_hook.remove()
        if self in self._registered:
            self._registered.remove(self)

    def __enter__(self) -> RestartHook:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _before_step(self, *_: object) -> None:
        group = self._group_now()
        if group is None:
            return
        # On a GPU this is a tensor; copying it does not synchronize.
        step = group["step"]
        self._step_before = step.clone() if isinstance(step, Tensor) else step

    def _after_step(self, *_: object) -> None:
        group = self._group_now()
        if group is None:
            return
        # After a skipped step the group may still be where a cycle has ended before.
        step, cycle, T_cur, _T_i = position_of(group)
        if T_cur == 0 < cycle and step == int(self._step_before) + 1:
            self._hook(self._optimizer)

    def after_restart(self, groups: Sequence[dict[str, Any]]) -> None:
        """Calls the hook if its group is among those that ``restart()`` has restarted."""
        if any(group is self._group_now() for group in groups):
            self._hook(self._optimizer)

    def _group_now(self) -> dict[str, Any] | None:
        """The group; None if the user has removed it."""
        groups = self._optimizer.param_groups
        return groups[self._index] if self._index < len(groups) else None
