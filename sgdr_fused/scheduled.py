"""What the schedule offers besides torch's interface: where it is, and how to move it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sgdr_fused.base import SteppedOptimizer
from sgdr_fused.device_state import restart_group
from sgdr_fused.groups import index_of_group, kept_on_success, move_group, position_of
from sgdr_fused.restart_hook import RestartHook
from sgdr_fused.schedule import CosineWarmRestarts, Position

__all__ = ["ScheduledOptimizer"]


class ScheduledOptimizer(SteppedOptimizer):
    """An optimizer whose param groups each follow a schedule with warm restarts."""

    _restart_hooks: Sequence[RestartHook] = ()

    def get_last_lr(self) -> list[float]:
        """Each group's LR for the next step, under the name that torch's schedulers use."""
        return [float(group["lr"]) for group in self.param_groups]

    @property
    def cycle(self) -> int:
        """Index of the current cycle of group 0."""
        return position_of(self.param_groups[0]).cycle

    @property
    def is_cycle_end(self) -> bool:
        """Whether the last step has ended a cycle of group 0, or :meth:`restart` has since.

        Asked after each step, it is True once a cycle; a skipped step ends none. On a GPU and for
        compiled steps ask it after each step: skipped steps before the first question are not seen.
        """
        return self._cycle_end.is_now(self.param_groups[0])

    @property
    def begun_at(self) -> Position:
        """Where the schedule of group 0 was last put, instead of stepped.

        That is, when the optimizer was made, or by ``load_state_dict()`` or ``seek()``.
        """
        return self._cycle_end.begun_at

    def restart(self, group: int | None = None) -> None:
        """Begin the next cycle now, for example on a plateau.

        Args:
            group: Index of the param group; None: all of them.

        Raises:
            ValueError: The group has no further cycle, because of ``n_cycles``, or ``group`` is not
                an integer.
            IndexError: There is no such group.
        """
        groups = self.param_groups
        if group is not None:
            groups = [groups[index_of_group(groups, group)]]
        with self._lock, kept_on_success(self.param_groups):
            self._sync()  # an invalid option is an error before anything moves
            starts = [CosineWarmRestarts.of_group(g).restart(position_of(g)) for g in groups]
            for param_group, start in zip(groups, starts, strict=True):
                restart_group(param_group, start, self.state)
            self._sync()
            self._cycle_end.is_now(self.param_groups[0])
        for hook in tuple(self._restart_hooks):
            hook.after_restart(groups)

    def register_restart_hook(self, hook: Callable[[Any], object], group: int = 0) -> RestartHook:
        """Call a function whenever a cycle ends: after its last step, and at each :meth:`restart`.

        The end of the last of ``n_cycles`` calls it too. A skipped step does not call it again, nor
        do :meth:`seek` and :meth:`load_state_dict`. On a GPU each step synchronizes, to know
        whether it has ended a cycle; the replays of a CUDA graph call no hook.

        Args:
            hook: The function. Its argument is the optimizer, in which the next cycle has begun.
            group: Index of the param group whose cycles count.

        Returns:
            A handle; its ``remove()`` unregisters the hook. Pickle and deepcopy leave hooks out, as
            in torch.

        Raises:
            TypeError: ``hook`` is not callable.
            ValueError: ``group`` is not an integer.
            IndexError: There is no such group.

        Example:
            >>> optimizer.register_restart_hook(lambda o: print(f"cycle {o.cycle - 1} has ended"))
        """
        # Made here, because unpickling does not call __init__.
        registered = self.__dict__.setdefault("_restart_hooks", [])
        return RestartHook(self, hook, group, registered)

    def seek(self, step: int) -> None:
        """Jump every group's schedule to a step, as if that many had been applied.

        Momentum stays as it is.

        Args:
            step: Number of applied steps, from 0 to 2**61. Earlier ``restart()`` calls have no
                effect on the schedule's position at that step.

        Raises:
            ValueError: ``step`` is out of its range or not an integer.
        """
        with self._lock, kept_on_success(self.param_groups):
            for group in self.param_groups:
                move_group(group, CosineWarmRestarts.of_group(group).position(step))
            self._begin()
