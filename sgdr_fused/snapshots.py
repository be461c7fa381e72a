"""Snapshot ensembles: average the predictions of the weights at the end of each cycle."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgdr_fused import saving
from sgdr_fused.groups import position_of
from sgdr_fused.optimizer import FusedSGDR
from sgdr_fused.schedule import Position

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
        folder: Folder to keep them in, one file of :func:`~sgdr_fused.save` each, named after the
            cycle; snapshots that are there already count, and what killed processes have left
            unfinished is removed. None: in the CPU's memory. With several processes, give each a
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
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            saving.remove_unfinished(self.folder)
        self._optimizer_begun_at = optimizer.begun_at
        self._begun_at: Position | None = self._place()
        self._cycle_seen = self._begun_at.cycle

    @property
    def cycles(self) -> list[int]:
        """Indices of the cycles whose weights are kept, the oldest first."""
        cycles = self._all_cycles()
        # A process that was killed in take() may have left more than `keep`.
        return cycles if self.keep is None else cycles[-self.keep :]

    def _all_cycles(self) -> list[int]:
        if self.folder is None:
            return sorted(self._in_memory)
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def update(self) -> bool:
        """Takes a snapshot if a cycle has ended since the last call.

        Call it after each step: then the weights are those at the cycle's end. With cycles of whole
        epochs (``steps_per_epoch``) a call at the end of each epoch is enough, but if steps are
        skipped, a cycle ends within an epoch, and the weights are those at that epoch's end. If
        several cycles have ended, the snapshot is of the latest.

        Call it once after resuming, too, before the first step: if the process was killed between
        the end of a cycle and :meth:`update`, it takes that cycle's snapshot. After a step it would
        be too late, and a warning says that the snapshot is missing.

        If the optimizer's state is on a GPU, this synchronizes.

        Returns:
            Whether a snapshot was taken.
        """
        place = self._place()
        if self.optimizer.begun_at is not self._optimizer_begun_at:
            self._optimizer_begun_at = self._begun_at = self.optimizer.begun_at
            self._cycle_seen = self._begun_at.cycle
        if self._begun_at is not None:
            self._look_back(self._begun_at, place)
            self._begun_at = None
        has_ended = place.cycle > self._cycle_seen
        if has_ended:
            self.take(place.cycle - 1)
        self._cycle_seen = place.cycle
        return has_ended

    def _look_back(self, begun_at: Position, place: Position) -> None:
        """Makes good what a killed process has left undone before ``begun_at``."""
        self._drop_surplus()
        cycles = self._all_cycles()
        missing = begun_at.cycle - 1
        if missing < 0 or missing in cycles:
            return
        if begun_at == place and place.T_cur == 0:
            self._cycle_seen = missing  # the weights are still those at its end
            return
        newest = max(cycles, default=-1)
        if self.folder is not None and newest < missing and (newest >= 0 or begun_at.T_cur == 0):
            warnings.warn(
                f"{str(self.folder)!r} has no snapshot of cycle {missing}, which had ended before "
                "the training was resumed, and the weights have changed since; call update() right "
                "after resuming, before the first step",
                stacklevel=3,
            )

    def _place(self) -> Position:
        return position_of(self.optimizer.param_groups[0])

    def take(self, cycle: int) -> None:
        """Keeps the weights and buffers as they are now.

        Args:
            cycle: Index of the snapshot, >= 0. A snapshot of that index is replaced. Snapshots of
                later cycles are deleted: the training has been resumed from before them.

        Raises:
            ValueError: ``cycle`` is negative, as ``optimizer.cycle - 1`` is in the first cycle.
            TypeError: ``cycle`` is not an integer, or a weight is sharded, as under FSDP2.
        """
        cycle = _checked_cycle(cycle)
        weights = {
            name: value.detach().to("cpu", copy=True)
            for name, value in _whole_tensors(self.model).items()
        }
        # In an order in which a process may be killed at any time: later cycles go first, because
        # they are no part of this training, and older ones last.
        for other in reversed(self._all_cycles()):
            if other > cycle:
                self._drop(other)
        if self.folder is None:
            self._in_memory[cycle] = weights
        else:
            saving.save(weights, self._path(cycle))
        self._drop_surplus()
        if cycle == self._place().cycle - 1:
            self._cycle_seen = cycle + 1

    def load(self, cycle: int) -> dict[str, Tensor]:
        """The weights at the end of a cycle, as a state_dict of the model on the CPU.

        Raises:
            KeyError: There is no snapshot of that cycle.
            ValueError: The file is damaged, or no snapshot; the message names it.
        """
        if cycle not in self.cycles:
            raise KeyError(
                f"no snapshot of cycle {cycle}; there are snapshots of cycles {self.cycles}"
            )
        if self.folder is None:
            return {name: value.clone() for name, value in self._in_memory[cycle].items()}
        loaded = saving.load(self._path(cycle))
        if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
            raise ValueError(
                f"{str(self._path(cycle))!r} is no snapshot: it holds no dict of tensors; move it "
                "to another folder"
            )
        return loaded

    @contextmanager
    def swapped_in(self, cycle: int) -> Iterator[nn.Module]:
        """Gives the model the weights at the end of a cycle, within a ``with`` block.

        Raises:
            KeyError: There is no snapshot of that cycle.
            ValueError: The snapshot is damaged or of another model; the model is as it was.
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
        self, *inputs: Any, of_output: Callable[[Any], Tensor] | None = None, **named_inputs: Any
    ) -> Tensor:
        """The mean of the snapshots' predictions, in evaluation mode.

        Args:
            *inputs: The model's arguments, passed on as they are: ``predict(batch)`` calls
                ``model(batch)``, also for a dict or a tuple, ``predict(*batch)`` calls
                ``model(*batch)``.
            of_output: Makes a prediction of the model's output; None: the softmax over the last
                dimension.
            **named_inputs: The model's keyword arguments, as in ``predict(**batch)``.

        Returns:
            The mean, of the shape of a prediction.

        Raises:
            RuntimeError: There is no snapshot yet.
            ValueError: A snapshot is damaged or of another model.
            TypeError: A prediction is not a tensor, so that ``of_output`` is needed.
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
                    predicted = _prediction(model(*inputs, **named_inputs), of_output)
                total = predicted if total is None else total + predicted
        finally:
            for module, mode in modes.items():
                module.training = mode
        assert total is not None
        return total / len(cycles)

    def _path(self, cycle: int) -> Path:
        assert self.folder is not None
        return self.folder / f"snapshot-{cycle:06d}.pt"

    def _drop_surplus(self) -> None:
        for cycle in sorted(set(self._all_cycles()) - set(self.cycles)):
            self._drop(cycle)

    def _drop(self, cycle: int) -> None:
        if self.folder is None:
            del self._in_memory[cycle]
        else:
            self._path(cycle).unlink(missing_ok=True)


def _checked_cycle(cycle: int) -> int:
    if isinstance(cycle, bool) or not hasattr(cycle, "__index__"):
        raise TypeError(f"Invalid cycle value: {cycle!r}; cycle must be an integer")
    if index(cycle) < 0:
        raise ValueError(
            f"Invalid cycle value: {cycle!r}; cycle must be >= 0, the index of a cycle that has "
            "ended; none has ended while optimizer.cycle is 0"
        )
    return index(cycle)


def _prediction(output: Any, of_output: Callable[[Any], Tensor] | None) -> Tensor:
    predicted = output if of_output is None else of_output(output)
    if not isinstance(predicted, Tensor):
        what = "the model's output" if of_output is None else "the result of of_output"
        raise TypeError(
            f"{what} is no tensor, but a {type(predicted).__name__}; pass an of_output=function "
            "that makes the tensor of class probabilities of the output"
        )
    return torch.softmax(predicted, dim=-1) if of_output is None else predicted


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
