"""Snapshot ensembles: average the predictions of the weights at the end of each cycle."""

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
    """Keeps a model's weights at the end of each cycle, and predicts with all of them.

    At the end of a cycle the LR is at its lowest and the weights are in a minimum. The restart
    leaves it for another one, and the mean of their predictions is better than each of them.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer; the cycles are those of group 0.
        keep: Number of snapshots to keep, the latest; None: all.
        folder: Folder to keep them in, one file each, named after the cycle; snapshots that are
            there already count. None: in the CPU's memory. With several processes, give each a
            folder of its own, or take the snapshots in one process only.

    Raises:
        ValueError: ``keep`` is not an integer >= 1.

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

        If the optimizer's state is on a GPU, this synchronizes. With cycles of whole epochs
        (``steps_per_epoch``), a call at the end of each epoch is enough.

        Returns:
            Whether a snapshot was taken.
        """
        before, self._step_seen = self._step_seen, self._step_now()
        # Without an applied step, the cycle that has ended already has its snapshot.
        if not self.optimizer.is_cycle_end or self._step_seen == before:
            return False
        self.take(self.optimizer.cycle - 1)
        return True

    def _step_now(self) -> int:
        return int(self.optimizer.param_groups[0]["step"])

    def take(self, cycle: int) -> None:
        """Keeps the weights and buffers as they are now.

        Args:
            cycle: Index of the snapshot. A snapshot of that index is replaced. Snapshots of later
                cycles are deleted: the training has been resumed from before them.

        Raises:
            TypeError: A weight is sharded, as under FSDP2.
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
            raise KeyError(
                f"no snapshot of cycle {cycle}; there are snapshots of cycles {self.cycles}"
            )
        if self.folder is None:
            return {name: value.clone() for name, value in self._in_memory[cycle].items()}
        loaded: dict[str, Tensor] = torch.load(self._path(cycle), weights_only=True)
        return loaded

    @contextmanager
    def swapped_in(self, cycle: int) -> Iterator[nn.Module]:
        """Gives the model the weights at the end of a cycle, within a ``with`` block.

        Raises:
            KeyError: There is no snapshot of that cycle.
            ValueError: The snapshot is of another model; the model is as it was.
        """
        weights, current = self.load(cycle), _whole_tensors(self.model)
        for name in sorted(weights.keys() | current.keys()):
            found, expected = (_shape_in_words(tensors.get(name)) for tensors in (weights, current))
            if found != expected:
                raise ValueError(
                    f"the snapshot of cycle {cycle} is of another model: {name!r} {found} in it, "
                    f"but {expected} in the model; use a folder={str(self.folder)!r} of its own "
                    "for each model"
                )
        own = {name: value.clone() for name, value in current.items()}
        try:
            # Not strict, because a state_dict may also hold values that are not tensors.
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
        """The mean of the snapshots' predictions, in evaluation mode.

        Args:
            inputs: The model's argument.
            of_output: Makes a prediction of the model's output; by default the softmax over the
                last dimension.

        Returns:
            The mean, of the shape of a prediction.

        Raises:
            RuntimeError: There is no snapshot yet.
            ValueError: A snapshot is of another model.
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
    """The tensors in a model's state_dict, which may also hold other values."""
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for name, value in tensors.items():
        if hasattr(value, "placements"):
            raise TypeError(
                f"{name!r} is in shards, but a snapshot needs whole tensors; save the model with "
                "torch.distributed.checkpoint in a hook of optimizer.register_restart_hook()"
            )
    return tensors


def _shape_in_words(tensor: Tensor | None) -> str:
    return "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes the whole file or, if writing fails, none."""
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
