"""What others write into an optimizer's param groups that must not be there.

A torch LR scheduler has written into them before FusedSGDR can refuse it. An option of the whole
optimizer has no effect in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from sgdr_fused.groups import check_groups
from sgdr_fused.options import OPTIONS, refuse_options_of_all_groups

__all__ = ["REFUSAL", "NotedGroups"]

REFUSAL = (
    "FusedSGDR computes its own learning rate, so a torch LR scheduler would overwrite it; remove "
    "the scheduler and pass T_0, T_mult, eta_min, warmup_steps, ... to FusedSGDR instead, and "
    'ema_decay="swa" for SWALR; for a learning-rate range test use sgdr_fused.lr_range_test(); for '
    "a trainer that requires a scheduler use sgdr_fused.trainers.as_scheduler(optimizer)"
)

# OneCycleLR, CyclicLR and SWALR add these before they attach themselves.
_ADDED = ("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
_SHARED = tuple(option.name for option in OPTIONS if not option.per_group)
_NOTED = ("initial_lr", "momentum", *_ADDED, *_SHARED)


class NotedGroups:
    """Checks param groups, and notes what a torch LR scheduler may overwrite in them.

    Every stepper calls it when it first sees a change of the groups.

    Args:
        shared: The options of the whole optimizer.
    """

    def __init__(self, shared: Mapping[str, Any]) -> None:
        self.shared = shared
        # By id, because groups that are dropped must be freed.
        self._noted: dict[int, dict[str, Any]] = {}

    def __call__(self, param_groups: Sequence[MutableMapping[str, Any]]) -> None:
        """:func:`~sgdr_fused.groups.check_groups`, with a note of each group.

        Raises:
            ValueError: An option of the whole optimizer was written into a group.
        """
        check_groups(param_groups)
        for group in param_groups:
            noted = self._noted.get(id(group), {})
            # ZeroRedundancyOptimizer's groups keep the values that the optimizer was made with.
            names = [name for name in _SHARED if group.get(name) is not noted.get(name)]
            written = {name: group[name] for name in names if name in group}
            refuse_options_of_all_groups(written, self.shared)
        self._noted = {
            id(group): {name: group[name] for name in _NOTED if name in group}
            for group in param_groups
        }

    def take_back(self, param_groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Undoes what a scheduler has written before it was refused.

        The LR is the schedule's again, also where it was set by hand: CyclicLR leaves no sign of
        having set it.

        Args:
            param_groups: The optimizer's.
        """
        for group in param_groups:
            noted = self._noted.get(id(group))
            if noted is None:
                continue
            written = [name for name in _ADDED if group.get(name) is not noted.get(name)]
            if "max_lr" in written:
                written.append("initial_lr")
            if "max_momentum" in written:
                written.append("momentum")
            for name in written:
                if name in noted:
                    group[name] = noted[name]
                else:
                    del group[name]
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(group["scheduled_lr"])
            else:
                group["lr"] = group["scheduled_lr"]
