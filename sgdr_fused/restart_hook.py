"""A hook that is called where a cycle ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sgdr_fused.groups import position_of

if TYPE_CHECKING:
    from sgdr_fused.optimizer import FusedSGDR

__all__ = ["RestartHook"]


class RestartHook:
    """A registered hook, to be removed with :meth:`remove` or at the end of a ``with`` block.

    See :meth:`~sgdr_fused.FusedSGDR.register_restart_hook`.

    Args:
        optimizer: Whose cycles they are.
        hook: What to call.
        group: Index of the param group that says where a cycle ends.

    Raises:
        IndexError: There is no such group.
    """

    def __init__(
        self, optimizer: FusedSGDR, hook: Callable[[FusedSGDR], object], group: int
    ) -> None:
        self._hook = hook
        if not -len(optimizer.param_groups) <= group < len(optimizer.param_groups):
            raise IndexError(
                f"group={group} is none of the {len(optimizer.param_groups)} param groups"
            )
        # Counted from the front, so that a group that is added later does not change it.
        self._index = group % len(optimizer.param_groups)
        self._optimizer = optimizer
        self._step_before: Any = None
        self._step_hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        optimizer._restart_hooks = (*optimizer._restart_hooks, self)

    def remove(self) -> None:
        """Calls the hook no more."""
        for step_hook in self._step_hooks:
            step_hook.remove()
        self._optimizer._restart_hooks = tuple(
            hook for hook in self._optimizer._restart_hooks if hook is not self
        )

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
        # On a GPU a tensor, for which nobody waits here.
        step = self._group_now()["step"]
        self._step_before = step.clone() if isinstance(step, Tensor) else step

    def _after_step(self, *_: object) -> None:
        # A skipped step stays where a cycle may have ended before.
        step, cycle, T_cur, _T_i = position_of(self._group_now())
        if T_cur == 0 < cycle and step == int(self._step_before) + 1:
            self._hook(self._optimizer)

    def after_restart(self, groups: Sequence[dict[str, Any]]) -> None:
        """Calls the hook if its group is among those that were restarted by hand."""
        if any(group is self._group_now() for group in groups):
            self._hook(self._optimizer)

    def _group_now(self) -> dict[str, Any]:
        return self._optimizer.param_groups[self._index]
