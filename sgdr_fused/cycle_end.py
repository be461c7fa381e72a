"""Whether a step has just ended a cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sgdr_fused.groups import position_of

__all__ = ["CycleEnd"]


class CycleEnd:
    """Tells the end of a group's cycle after the step that ends it, not after skipped steps.

    A skipped step leaves the schedule where it is, at the start of a cycle too, and counts itself.
    So this notes the count when it first sees the schedule at a place.

    Args:
        group: The param group, whose schedule was just put where it is.

    Attributes:
        begun_at: The schedule's position then.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.begun_at = position_of(group)
        self._place = self.begun_at
        self._skipped_before = int(group["skipped_steps"])

    def is_now(self, group: Mapping[str, Any]) -> bool:
        """Whether a cycle has ended and no step was skipped since; synchronizes on a GPU."""
        place, skipped = position_of(group), int(group["skipped_steps"])
        if place != self._place:
            self._place, self._skipped_before = place, skipped
        return place.T_cur == 0 < place.cycle and skipped == self._skipped_before

    def before_step(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Notes the count before a step that may be skipped.

        Not on a GPU, because reading synchronizes; there :meth:`is_now` has to be asked each step.
        """
        # If the groups are not valid, the step will say so.
        with suppress(Exception):
            T_cur = param_groups[0]["T_cur"]
            if type(T_cur) is int and T_cur == 0:
                self.is_now(param_groups[0])
