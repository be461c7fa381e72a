"""For trainers that insist on a scheduler object: one that shows what the optimizer does itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sgdr_fused.groups import position_of
from sgdr_fused.optimizer import FusedSGDR

__all__ = ["SchedulerView", "as_scheduler"]


def as_scheduler(optimizer: Optimizer) -> SchedulerView:
    """A scheduler for trainers that insist on one, as Hugging Face's ``Trainer`` does.

    It changes nothing: the optimizer moves its own schedule at each applied step. Where a trainer
    does not ask for a scheduler, leave it out.

    Args:
        optimizer: A :class:`~sgdr_fused.FusedSGDR`, or the wrapper that Accelerate or Lightning put
            around it.

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
    """The schedule of a :class:`~sgdr_fused.FusedSGDR` under the interface of torch's schedulers.

    ``get_last_lr()`` keeps a scheduler's contract: it changes when ``step()`` is called, not
    before, so that a trainer which asks between the two logs the LR of the step just taken.

    Args:
        optimizer: Whose schedule to show.
    """

    # torch's would wrap optimizer.step() and set the LR; neither is wanted.
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
        """Take note of the LR for ``get_last_lr()``; the optimizer has moved it already.

        Args:
            epoch: Ignored; :meth:`~sgdr_fused.FusedSGDR.seek` goes to a step.
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
        """What ``get_last_lr()`` gives; the schedule itself is in the optimizer's state_dict."""
        return {"_last_lr": self.get_last_lr()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``get_last_lr()`` gives.

        Args:
            state_dict: Of a view like this one, or of the torch scheduler that was there before.
        """
        self._last_lr = list(state_dict["_last_lr"])

    def _note_lr(self) -> None:
        # Copies that stay on the GPU, for to read them would wait for it.
        self._last_lr = [
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            for group in self.optimizer.param_groups
        ]
