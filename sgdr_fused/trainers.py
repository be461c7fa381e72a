"""A scheduler object for trainers that require one; it shows the optimizer's own schedule."""

from __future__ import annotations

from typing import Any

import torch
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

    On a GPU ``step()`` sends the LR to the host without waiting, and ``get_last_lr()`` waits until
    it has arrived. So a trainer that asks for the LR of each step, as Hugging Face's does, waits
    for the optimizer's step before that one only, and the GPU has work meanwhile.

    Args:
        optimizer: The optimizer whose schedule to show.
    """

    # super().__init__() is not called, because it would wrap optimizer.step() and set the LR.
    def __init__(self, optimizer: FusedSGDR) -> None:
        self.optimizer: FusedSGDR = optimizer
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self._step_count = 1  # Accelerate adds to it
        self._last_lr: list[Any] = []
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
        before = self._last_lr
        self._last_lr = []
        for i, group in enumerate(self.optimizer.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.is_cuda:
                sent = before[i] if i < len(before) else None
                lr = sent if isinstance(sent, _SentLr) else _SentLr()
                lr.send(group["lr"])
            self._last_lr.append(lr if isinstance(lr, _SentLr) else float(lr))


class _SentLr:
    """An LR that a GPU sends to the host: sending does not wait, ``float()`` does."""

    def __init__(self) -> None:
        # Kept for the next one, because pinned memory takes long to allocate.
        self._on_host = torch.empty((), dtype=torch.float64, device="cpu", pin_memory=True)

    def send(self, lr: Tensor) -> None:
        self._on_host.copy_(lr.reshape(()), non_blocking=True)
        self._arrived = torch.cuda.current_stream(lr.device).record_event()

    def __float__(self) -> float:
        self._arrived.synchronize()
        return self._on_host.item()

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)  # for pickle and deepcopy
