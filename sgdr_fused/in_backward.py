"""Updates within backward(), one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakMethod

from torch import Tensor

from sgdr_fused.options import Clipping

__all__ = ["StepInBackward", "refuse_clipping"]


class StepInBackward:
    """The hooks that update each parameter as soon as its gradient is complete.

    See :meth:`~sgdr_fused.FusedSGDR.step_in_backward`.

    Args:
        param_groups: The optimizer's.
        step_param: A method of the optimizer that updates one parameter, given its index over all
            groups. The hooks do not keep the optimizer alive.

    Attributes:
        is_active: Whether the hooks are registered, that is, :meth:`remove` was not called.
    """

    def __init__(
        self, param_groups: Sequence[Mapping[str, Any]], step_param: Callable[[int], None]
    ) -> None:
        self.is_active = True
        self._step_param = WeakMethod(step_param)
        params = [param for group in param_groups for param in group["params"]]
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook(index))
            for index, param in enumerate(params)
            if param.requires_grad
        ]

    def remove(self) -> None:
        """Leaves the updates to :meth:`~sgdr_fused.FusedSGDR.step` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.is_active = False

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def update(param: Tensor) -> None:
            step_param = self._step_param()
            if step_param is not None:
                step_param(index)
                param.grad = None

        return update


def refuse_clipping(clipping: Clipping) -> None:
    """Raises for an option that needs all gradients before the first update.

    Raises:
        ValueError: ``max_grad_norm`` or ``skip_nonfinite`` is set.
    """
    for name, value in clipping._asdict().items():
        if value:
            raise ValueError(
                f"{name}={value!r} needs all gradients before the first update, but "
                f"step_in_backward() updates as they arrive; unset {name}, or do not call "
                "step_in_backward()"
            )
