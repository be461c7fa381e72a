"""Snapshot ensembles: the weights at the end of each cycle, averaged in what they predict."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgdr_fused.optimizer import FusedSGDR

__all__ = ["Snapshots"]

_NAME = re.compile(r"snapshot-(\d{6,})\.pt")


class Snapshots:
    """Keeps a model's weights at each cycle's end, and predicts with all that are kept.

    At the end of a cycle the LR is at its lowest and the weights are in a minimum, which the
    restart leaves for another: the mean of what they predict is better than each of them.

    Args:
        model: The model that is trained.
        optimizer: What trains it; group 0 says where the cycles end.
        keep: How many to keep, the latest; None: all.
        folder: Where to keep them, one file each, named after the cycle; what is there already is
            taken over. None: in the CPU's memory. Of several processes each needs a folder of its
            own, or one of them takes the snapshots.

    Raises:
        ValueError: ``keep`` is below 1 or no integer.

    Example:
        >>> snapshots = Snapshots(model, optimizer, keep=3)
        >>> for input, target in batches:
        >>>     optimizer.zero_grad()
        >>>     loss_fn(model(input), target).backward()
        >>>     optimizer.step()
        >>>     snapshots.update()

    References:
        Huang et al., *Snapshot Ensembles: Train 1, Get M for Free*, ICLR 2017,
        https://arxiv.org/abs/1704.00109.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedSGDR,
        keep: int | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ValueError(f"Invalid keep value: {keep!r}; keep must be an int >= 1 or None")
        self.model = model
        self.optimizer = optimizer
        self.keep = keep
        self.folder = None if folder is None else Path(folder)
        self._in_memory: dict[int, dict[str, Tensor]] = {}
        self._step_seen = self._step_now()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def cycles(self) -> list[int]:
        """Indices of the cycles whose weights are kept, the oldest first."""
        if self.folder is None:
            return sorted(self._in_memory)
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def update(self) -> bool:
        """Takes a snapshot if the last step has ended a cycle; call it after each step.

        Where the optimizer's state is on a GPU, this waits for the GPU. With cycles of whole epochs
        (``steps_per_epoch``) a call at the end of each epoch is enough.

        Returns:
            Whether one was taken.
        """
        before, self._step_seen = self._step_seen, self._step_now()
        # A skipped step, or none at all, stays where a cycle may have ended before.
        if not self.optimizer.is_cycle_end or self._step_seen == before:
            return False
        self.take(self.optimizer.cycle - 1)
        return True

    def _step_now(self) -> int:
        return int(self.optimizer.param_groups[0]["step"])

    def take(self, cycle: int) -> None:
        """Keeps the weights and buffers as they are now.

        Args:
            cycle: Under which index. One of that index is replaced, and those of later cycles are
                dropped: they are of a training that was taken up again from before them.

        Raises:
            TypeError: A weight is in shards, as under FSDP2.
        """
        weights = {
            name: value.detach().to("cpu", copy=True)
            for name, value in _whole_tensors(self.model).items()
        }
        if self.folder is None:
            self._in_memory[cycle] = weights
        else:
            _write(self._path(cycle), weights)
        cycles = self.cycles
        kept = [kept for kept in cycles if kept <= cycle][-(self.keep or len(cycles)) :]
        for other in cycles:
            if other not in kept:
                self._drop(other)

    def load(self, cycle: int) -> dict[str, Tensor]:
        """The weights at the end of a cycle, as a state_dict of the model on the CPU.

        Raises:
            KeyError: There is no snapshot of that cycle.
        """
        if cycle not in self.cycles:
            raise KeyError(f"no snapshot of cycle {cycle}; there are those of {self.cycles}")
        if self.folder is None:
            return {name: value.clone() for name, value in self._in_memory[cycle].items()}
        loaded: dict[str, Tensor] = torch.load(self._path(cycle), weights_only=True)
        return loaded

    @contextmanager
    def swapped_in(self, cycle: int) -> Iterator[nn.Module]:
        """Within the ``with`` block the model has the weights at the end of a cycle.

        Raises:
            KeyError: There is no snapshot of that cycle.
            ValueError: The snapshot is of another model. The model is as it was.
        """
        weights, current = self.load(cycle), _whole_tensors(self.model)
        for name in sorted(weights.keys() | current.keys()):
            found, expected = (_shape(tensors.get(name)) for tensors in (weights, current))
            if found != expected:
                raise ValueError(
                    f"the snapshot of cycle {cycle} is of another model: {name!r} has {found} in "
                    f"it, in the model {expected}; use a folder={str(self.folder)!r} of its own "
                    "for each model"
                )
        own = {name: value.clone() for name, value in current.items()}
        try:
            # Not strictly, for what the model says of itself besides tensors.
            self.model.load_state_dict(weights, strict=False)
            yield self.model
        finally:
            self.model.load_state_dict(own, strict=False)

    @torch.no_grad()
    def predict(
        self,
        inputs: Any,
        of_output: Callable[[Any], Tensor] = lambda output: torch.softmax(output, dim=-1),
    ) -> Tensor:
        """The mean over the snapshots of what the model predicts, in evaluation mode.

        Args:
            inputs: What the model is called with.
            of_output: What the mean is taken of: by default the softmax of the last dimension.

        Returns:
            The mean, of the shape that ``of_output`` gives.

        Raises:
            RuntimeError: There is no snapshot yet.
            ValueError: One is of another model.
        """
        cycles = self.cycles
        if not cycles:
            raise RuntimeError("there is no snapshot yet: no cycle has ended; see update()")
        modes = {module: module.training for module in self.model.modules()}
        total: Tensor | None = None
        try:
            for cycle in cycles:
                with self.swapped_in(cycle) as model:
                    model.eval()
                    predicted = of_output(model(inputs))
                total = predicted if total is None else total + predicted
        finally:
            for module, mode in modes.items():
                module.training = mode
        assert total is not None
        return total / len(cycles)

    def _path(self, cycle: int) -> Path:
        assert self.folder is not None
        return self.folder / f"snapshot-{cycle:06d}.pt"

    def _drop(self, cycle: int) -> None:
        if self.folder is None:
            del self._in_memory[cycle]
        else:
            self._path(cycle).unlink()


def _whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in a model's state_dict, which may hold anything besides."""
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for name, value in tensors.items():
        if hasattr(value, "placements"):
            raise TypeError(
                f"{name!r} is in shards, and a snapshot is of whole tensors; save the model with "
                "torch.distributed.checkpoint in a hook of optimizer.register_restart_hook()"
            )
    return tensors


def _shape(tensor: Tensor | None) -> str:
    return "no place" if tensor is None else f"the shape {tuple(tensor.shape)}"


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    """All of the file or nothing of it, also if the machine fails."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(weights, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
