"""A learning-rate range test: which LR should the schedule start from?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgdr_fused.groups import position_of
from sgdr_fused.optimizer import FusedSGDR
from sgdr_fused.pictures import new_figure
from sgdr_fused.values import floats, integers

__all__ = ["RangeTest", "lr_range_test"]

_LR = floats("a finite float > 0", lambda value: 0 < value < math.inf)
_N_STEPS = integers(3, 2**31, "an integer of at least 3")
_SMOOTHING = floats("a float in [0, 1)", lambda value: 0 <= value < 1)
_STOP_AT = floats("a float > 1", lambda value: value > 1)


@dataclass(frozen=True)
class RangeTest:
    """The result of :func:`lr_range_test`.

    Attributes:
        lrs: LR of each step.
        losses: Loss of each step.
        smoothed: The losses, averaged over the steps before.
        suggestion: The LR at which the smoothed loss falls fastest, to be the schedule's ``lr``;
            None if it falls nowhere.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None

    def plot(self, path: str) -> None:
        """Draw the smoothed loss over the LR, with a dot at the suggestion.

        Needs matplotlib: ``pip install matplotlib``.

        Args:
            path: The picture's file: a .png, .svg or .pdf.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure = new_figure("RangeTest.plot()", 5.6, 2.5)
        ax = figure.subplots()
        ax.plot(self.lrs, self.smoothed)
        if self.suggestion is not None:
            loss = self.smoothed[self.lrs.index(self.suggestion)]
            ax.plot(self.suggestion, loss, "o", label=f"{self.suggestion:.2g}")
            ax.legend()
        ax.set(xlabel="learning rate", ylabel="loss", xscale="log")
        figure.savefig(path, dpi=150)


def lr_range_test(
    model: nn.Module,
    optimizer: FusedSGDR,
    train_step: Callable[[], float | Tensor],
    *,
    lr_start: float = 1e-5,
    lr_end: float = 10.0,
    n_steps: int = 100,
    smoothing: float = 0.9,
    stop_at: float = 4.0,
) -> RangeTest:
    """Train with an exponentially growing LR, note the losses, and restore everything.

    Parameters and buffers of the model, the optimizer's state and torch's random numbers are
    restored bit for bit; gradients are dropped. No cycle ends within the test, so no restart hook
    is called. A GradScaler and the position of a data loader are the caller's: use spare ones.

    Args:
        model: The model that ``train_step`` trains.
        optimizer: Its optimizer. Where groups have different peaks, ``lr`` is that of the highest
            one, and the others keep their ratio to it.
        train_step: Takes one optimizer step on the next batch, and returns the loss. With several
            processes, the mean over all of them, so that all stop at the same step.
        lr_start: LR of the first step.
        lr_end: LR of the last step.
        n_steps: Number of steps.
        smoothing: Decay of the average of the losses.
        stop_at: The test ends when that average is above so many times its minimum, or when the
            loss is not finite.

    Returns:
        LRs, losses and a suggestion.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: ``optimizer`` is no FusedSGDR.
        RuntimeError: ``train_step`` takes no step of the optimizer.

    Example:
        >>> def train_step():
        >>>     input, target = next(iter(loader))
        >>>     optimizer.zero_grad()
        >>>     loss = loss_fn(model(input), target)
        >>>     loss.backward()
        >>>     optimizer.step()
        >>>     return loss
        >>> lr = lr_range_test(model, optimizer, train_step).suggestion

    References:
        Smith, *Cyclical Learning Rates for Training Neural Networks*, 2015,
        https://arxiv.org/abs/1506.01186, section 3.3. Smoothing and the end of the test are those
        of fastai's ``lr_find``.
    """
    if not isinstance(optimizer, FusedSGDR):
        raise TypeError(f"Expected optimizer to be a FusedSGDR, but got {type(optimizer).__name__}")
    lr_start, lr_end = _LR.plain("lr_start", lr_start), _LR.plain("lr_end", lr_end)
    if lr_start >= lr_end:
        raise ValueError(f"Expected lr_start < lr_end, but got {lr_start=} and {lr_end=}")
    n_steps = _N_STEPS.plain("n_steps", n_steps)
    smoothing = _SMOOTHING.plain("smoothing", smoothing)
    stop_at = _STOP_AT.plain("stop_at", stop_at)

    lrs = [lr_start * (lr_end / lr_start) ** (i / (n_steps - 1)) for i in range(n_steps)]
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with _restored(model, optimizer):
        for lr in lrs:
            _set_lr(optimizer, lr)
            before = _attempts(optimizer)
            loss = _number(train_step())
            if _attempts(optimizer) == before:
                raise RuntimeError("train_step() has not called optimizer.step()")
            if not math.isfinite(loss):
                break
            losses.append(loss)
            average = smoothing * average + (1 - smoothing) * loss
            smoothed.append(average / (1 - smoothing ** len(losses)))
            if smoothed[-1] > stop_at * min(smoothed):
                break
    return RangeTest(lrs[: len(losses)], losses, smoothed, _steepest(lrs, smoothed))


def _steepest(lrs: list[float], losses: list[float]) -> float | None:
    slopes = [after - before for before, after in zip(losses, losses[2:], strict=False)]
    if not slopes or min(slopes) >= 0:
        return None
    return lrs[slopes.index(min(slopes)) + 1]


def _number(loss: float | Tensor) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)


def _set_lr(optimizer: FusedSGDR, lr: float) -> None:
    highest = max(group["initial_lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["initial_lr"] / highest if highest > 0 else 1)
        group["T_i"] = 2**53  # the cycle does not end


def _attempts(optimizer: FusedSGDR) -> int:
    """Number of calls of ``step()`` so far, skipped ones among them."""
    return position_of(optimizer.param_groups[0]).step + optimizer.skipped_steps


@contextmanager
def _restored(model: nn.Module, optimizer: FusedSGDR) -> Iterator[None]:
    """Restores model, optimizer and random numbers at the end of a ``with`` block."""
    buffers = [(m, *named) for m in model.modules() for named in m.named_buffers(recurse=False)]
    params = (param for group in optimizer.param_groups for param in group["params"])
    tensors = [*model.parameters(), *model.buffers(), *params]
    values = [tensor.detach().clone() for tensor in tensors]
    saved = optimizer.state_dict()
    saved["state"] = {
        index: {k: v.clone() if isinstance(v, Tensor) else v for k, v in of_param.items()}
        for index, of_param in saved["state"].items()
    }
    cuda = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            optimizer.zero_grad()
            optimizer.load_state_dict(saved)
