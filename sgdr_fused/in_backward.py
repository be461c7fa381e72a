"""Updates within backward(), one parameter at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

from torch import Tensor

if TYPE_CHECKING:
    from sgdr_fused.optimizer import FusedSGDR
    from sgdr_fused.reference import Clipping

__all__ = ["StepInBackward", "refuse_clipping"]


class StepInBackward:
    """The hooks by which parameters are updated.

    See :meth:`~sgdr_fused.FusedSGDR.step_in_backward`.

    Args:
        optimizer: Whose parameters they are.

    Raises:
        ValueError: An option needs all gradients at once.
    """

    def __init__(self, optimizer: FusedSGDR) -> None:
        refuse_clipping(optimizer._clipping)
        self._optimizer = ref(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
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
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            optimizer._in_backward = None

    def _hook(self, index: int):  # type: ignore[no-untyped-def]
        def update(param: Tensor) -> None:
            optimizer = self._optimizer()
            if optimizer is not None:
                optimizer._step_param(index)
                param.grad = None

        return update


def refuse_clipping(clipping: Clipping) -> None:
    """Raises for options that need all gradients before the first update."""
    for name, value in clipping._asdict().items():
        if value:
            raise ValueError(
                f"{name}={value!r} needs all gradients before the first update, but "
                f"step_in_backward() updates as they arrive; unset {name}, or do not call "
                "step_in_backward()"
            )
