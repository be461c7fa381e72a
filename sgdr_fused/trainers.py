"""A scheduler object for trainers that require one; it shows the optimizer's own schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sgdr_fused.groups import position_of
from sgdr_fused.optimizer import FusedSGDR

__all__ = ["SchedulerView", "as_scheduler"]


def as_scheduler(optimizer: Optimizer) -> SchedulerView:
    """A scheduler for trainers that require one, as Hugging Face's ``Trainer`` does.

    It changes nothing: the optimizer moves its own schedule at each applied step. If a trainer
    does not require a scheduler, pass none.

    Args:
        optimizer: A :class:`~sgdr_fused.FusedSGDR`, or Accelerate's or Lightning's wrapper of one.

    Returns:
        A :class:`torch.optim.lr_scheduler.LRScheduler`.

    Raises:
        TypeError: There is no :class:`~sgdr_fused.FusedSGDR` in ``optimizer``.

    Example:
        >>> trainer = Trainer(model, args, optimizers=(optimizer, as_scheduler(optimizer)))
    """
    fused: Any = optimizer
    while hasattr(fused, "optimizer"):
        fused = fused.optimizer
    if not isinstance(fused, FusedSGDR):
        raise TypeError(
            f"as_scheduler() shows the schedule of a FusedSGDR, but got a {type(fused).__name__}; "
            "give other optimizers a torch LR scheduler"
        )
    return SchedulerView(fused)


class SchedulerView(LRScheduler):
    """The schedule of a :class:`~sgdr_fused.FusedSGDR`, with the interface of torch's schedulers.

    ``get_last_lr()`` changes only when ``step()`` is called, as for every scheduler. So a trainer
    that logs the LR between the optimizer's step and the scheduler's logs the LR of that step.

    Args:
        optimizer: The optimizer whose schedule to show.
    """

    # super().__init__() is not called, because it would wrap optimizer.step() and set the LR.
    def __init__(self, optimizer: FusedSGDR) -> None:
        self.optimizer: FusedSGDR = optimizer
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self._step_count = 1  # Accelerate adds to it
        self._note_lr()

    @property
    def last_epoch(self) -> int:  # type: ignore[override]  # a plain attribute in torch
        """Number of steps that the optimizer has applied."""
        return position_of(self.optimizer.param_groups[0]).step

    def step(self, epoch: int | None = None, metric: object = None) -> None:
        """Update ``get_last_lr()``; the optimizer has moved its schedule already.

        Args:
            epoch: Ignored; use :meth:`~sgdr_fused.FusedSGDR.seek` to jump to a step.
            metric: Ignored.
        """
        self._step_count += 1
        self._note_lr()

    def step_update(self, num_updates: int, metric: object = None) -> None:
        """:meth:`step` under the name that timm calls at each update.

        Args:
            num_updates: Ignored.
            metric: Ignored.
        """
        self.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """Each group's LR at the last ``step()``, as floats."""
        return [float(lr) for lr in self._last_lr]

    def get_lr(self) -> list[float | Tensor]:
        """Each group's LR for the optimizer's next step, as floats."""
        return [*self.optimizer.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """The result of ``get_last_lr()``; the schedule itself is in the optimizer's state_dict."""
        return {"_last_lr": self.get_last_lr()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of ``get_last_lr()``.

        Args:
            state_dict: That of a view like this one, or of a torch scheduler.
        """
        self._last_lr = list(state_dict["_last_lr"])

    def _note_lr(self) -> None:
        # Copies stay on the GPU, because reading them would synchronize.
        self._last_lr = [
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            for group in self.optimizer.param_groups
        ]
