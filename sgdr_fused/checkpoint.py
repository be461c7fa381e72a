"""What ``torch.distributed.checkpoint`` needs of the optimizer, besides what every caller needs.

Its ``get_state_dict`` and ``set_state_dict`` call the optimizer as any user does, but expect that
all state exists:

- If the optimizer has no state, they take a step with gradients of zero and an LR of 0, only to
  create it. That step must not advance the schedule, nor count as a parameter's first step.
- They load the entries of a state_dict that was made beforehand, and need each of them in the file.
  But a momentum buffer appears with a parameter's first step and disappears with
  ``reset_momentum``, and an average appears at the end of a cycle. So they get a tensor for each:
  a placeholder, all NaN, where there is no value. Loading removes the placeholders again.

No argument tells their calls from a user's, so :meth:`CheckpointCall.current` looks for their
module on the call stack.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sgdr_fused.tensors import dtypes_of_state, named_params

__all__ = ["CheckpointCall"]

_CALLER = "torch.distributed.checkpoint.state_dict"


class CheckpointCall:
    """A call of the optimizer by ``torch.distributed.checkpoint``; see this module's docstring."""

    @classmethod
    def current(cls) -> CheckpointCall | None:
        """The call under way; None if someone else calls."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__") == _CALLER:
                return cls()
            frame = frame.f_back
        return None

    @classmethod
    def for_new_state(cls, param_groups: Sequence[Mapping[str, Any]]) -> CheckpointCall | None:
        """The call of ``step()`` that only creates the state; None for a real step.

        Args:
            param_groups: The optimizer's.
        """
        lr = param_groups[0]["lr"]
        # The call sets a number; a tensor on a GPU is the kernel's, and reading it synchronizes.
        is_on_gpu = isinstance(lr, Tensor) and lr.device.type != "cpu"
        return cls.current() if not is_on_gpu and lr == 0 else None

    def add_missing_keys(
        self, param_groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, Any]
    ) -> None:
        """Adds a None under each key that the state will have.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's. To a step, None is the same as a missing key.
        """
        for _, group, param in named_params(param_groups):
            if param.requires_grad or param in state:
                of_param = state.setdefault(param, {})
                for key in (*dtypes_of_state(group, param), *_counts(group)):
                    of_param.setdefault(key, None)

    def with_placeholders(
        self, param_groups: Sequence[Mapping[str, Any]], packed_state: Mapping[Any, Any]
    ) -> dict[Any, Any]:
        """The state with placeholders for None.

        Args:
            param_groups: The optimizer's.
            packed_state: The state in a state_dict, by the parameters' indices.
        """
        complete: dict[Any, Any] = dict(packed_state)
        for index, (_, group, param) in enumerate(named_params(param_groups)):
            if index not in complete:
                continue
            complete[index] = of_param = dict(complete[index])
            for role, dtype in dtypes_of_state(group, param).items():
                if of_param.get(role) is None:
                    of_param[role] = torch.full_like(param.detach(), math.nan, dtype=dtype)
            for name in _counts(group):
                of_param[name] = of_param.get(name) or 0
        return complete

    def without_placeholders(self, of_param: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's loaded state without the placeholders.

        Args:
            of_param: The parameter's state, by key.
        """
        kept = {key: value for key, value in of_param.items() if not _is_placeholder(value)}
        if "ema" not in kept:
            kept.pop("n_averaged", None)
        return kept


def _counts(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("n_averaged",) if group["ema_decay"] == "swa" else ()


def _is_placeholder(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    # Summed over all ranks: a shard without elements cannot tell.
    count = value.isnan().sum()
    return int(count.full_tensor() if hasattr(count, "full_tensor") else count) == value.numel()
