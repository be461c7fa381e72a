"""The work that all candidates of a case share, and the check that a candidate does all of it.

A candidate is timed only after its update was compared with the reference's. The comparison's
tolerance is refused if it is so large that a missing option would not be found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.shapes import Shapes
from sgdr_fused import FusedSGDR

__all__ = ["CHECKED_STEPS", "OPTIONS", "SCHEDULE", "Build", "Step", "Workload", "fused_sgdr"]

# An LR so large that after a few steps every option's effect is above the rounding, also weight
# decay's.
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
# A first cycle so short that CHECKED_STEPS reach a restart.
SCHEDULE = {"T_0": 3, "T_mult": 2, "eta_min": 1e-3}
CHECKED_STEPS = 4
# For each option, the settings of a candidate that lacks it.
WITHOUT: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0, "nesterov": False},
    "Nesterov": {"nesterov": False},
    "weight decay": {"weight_decay": 0},
    "the schedule": {"eta_min": OPTIONS["lr"]},
    "the restart": {"n_cycles": 1},
}

ParamGroups = list[dict[str, Any]]
Step = Callable[[], object]
# Makes an optimizer for param groups, and the function that takes one step.
Build = Callable[[ParamGroups], tuple[Optimizer, Step]]


def fused_sgdr(
    groups: ParamGroups, backend: str = "native", **options: Any
) -> tuple[Optimizer, Step]:
    """FusedSGDR with the benchmarks' options and further ones, and its step."""
    optimizer = FusedSGDR(groups, **OPTIONS | SCHEDULE | options, backend=backend)
    return optimizer, optimizer.step


@dataclass(frozen=True)
class Expected:
    """The reference's result for a workload.

    Attributes:
        tensors: The parameters after CHECKED_STEPS, then their averages if there are any.
        changes: The least change of a parameter when an option of WITHOUT is missing.
    """

    tensors: list[Tensor]
    changes: dict[str, float]


class Workload:
    """Parameters with fixed gradients, which all candidates of a case share.

    They are allocated by kind: all parameters, then all gradients. Each candidate keeps the
    momentum buffers that it allocated at its first step.

    Args:
        shapes: The parameters' shapes.
        device: Their device.
        n_groups: Number of param groups, each with adjacent parameters.
        **options: FusedSGDR's options, besides those of all benchmarks.

    Attributes:
        params: The parameters, with gradients.
    """

    def __init__(
        self, shapes: Shapes, device: str = "cpu", n_groups: int = 1, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        self._grads = []
        for shape in shapes:
            # Magnitude from 0.5 to 1.5 with either sign, so that every element changes visibly.
            uniform = torch.rand(shape, generator=generator) - 0.5
            self._grads.append((uniform + torch.ones_like(uniform).copysign(uniform)).to(device))
        # Copies, without the gaps that intermediate results left.
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad.clone()
        self._start = [param.clone() for param in self.params]
        self._n_groups = n_groups
        self._options = options
        self._expected: dict[str, Expected] = {}

    def groups(self) -> ParamGroups:
        """The param groups, as a new list for each optimizer."""
        size = len(self.params) // self._n_groups
        ends = [*range(size, size * self._n_groups, size), len(self.params)]
        starts = [0, *ends[:-1]]
        pairs = zip(starts, ends, strict=True)
        return [{"params": self.params[start:end]} for start, end in pairs]

    def checked_step(
        self, name: str, build: Build, *, momentum_eps: float = 0.0, **options: Any
    ) -> Step:
        """Builds a candidate and checks its update; see :meth:`check`."""
        optimizer, step = build(self.groups())
        result = self._after_steps(self.params, optimizer, step)
        self.check(name, result, momentum_eps=momentum_eps, **options)
        return step

    def check(
        self, name: str, result: Sequence[Tensor], *, momentum_eps: float = 0.0, **options: Any
    ) -> None:
        """Compares a candidate's result with the reference's.

        Args:
            name: The candidate's name.
            result: The parameters after CHECKED_STEPS, then the averages if there are any.
            momentum_eps: Relative error of its momentum buffer after each step.
            **options: FusedSGDR's options for the reference, besides the workload's.

        Raises:
            AssertionError: They differ, or the tolerance is so large that a missing option would
                not be found.
        """
        # Each step rounds the parameter, of magnitude 1, a few times.
        tolerance = 2 * CHECKED_STEPS * torch.finfo(torch.float32).eps
        # A gradient is at most 1.5, and the buffer at most 1.5 times the number of steps.
        tolerance += OPTIONS["lr"] * 1.5 * CHECKED_STEPS**2 * momentum_eps
        expected = self._expected_with(options)
        for missing, change in expected.changes.items():
            assert tolerance < change, (
                f"{name}: a tolerance of {tolerance:.2g} would hide that {missing} is missing, "
                f"which changes the result by {change:.2g}"
            )
        try:
            torch.testing.assert_close(
                list(result), expected.tensors, rtol=tolerance, atol=tolerance
            )
        except AssertionError as error:
            raise AssertionError(f"{name} does not make the reference's update: {error}") from error

    def _expected_with(self, options: dict[str, Any]) -> Expected:
        key = str(sorted(options.items()))
        if key not in self._expected:
            of_all = self._options | options
            optimizer, step = fused_sgdr(self.groups(), backend="reference", **of_all)
            tensors = self._after_steps(self.params, optimizer, step)
            for param, start in zip(tensors, self._start, strict=False):
                assert (param - start).abs().min() > OPTIONS["lr"] / 4
            self._expected[key] = Expected(tensors, self._changes(of_all))
        return self._expected[key]

    def _changes(self, options: dict[str, Any]) -> dict[str, float]:
        """For each option of WITHOUT, the minimum over the parameters of the largest change.

        A change is relative to 1 + abs(element), as the tolerance is. The first elements of the
        first parameters are enough: more elements only make the largest change larger.
        """
        params = [start.flatten()[:64].clone() for start in self._start[:500]]
        for param, grad in zip(params, self._grads, strict=False):
            param.grad = grad.flatten()[:64].clone()

        def after(options: dict[str, Any]) -> list[Tensor]:
            groups = [{"params": params}]
            optimizer, step = fused_sgdr(groups, backend="reference", **options)
            return self._after_steps(params, optimizer, step)[: len(params)]

        expected = after(options)
        changes = {}
        for missing, instead in WITHOUT.items():
            pairs = zip(expected, after(options | instead), strict=True)
            changes[missing] = min(float(((e - o).abs() / (1 + e.abs())).max()) for e, o in pairs)
        return changes

    def _after_steps(
        self, params: Sequence[Tensor], optimizer: Optimizer, step: Step
    ) -> list[Tensor]:
        """Takes CHECKED_STEPS from the start; returns the parameters and their averages."""
        for param, start in zip(params, self._start, strict=False):
            param.copy_(start.flatten()[: param.numel()].view_as(param))
        for _ in range(CHECKED_STEPS):
            # Some candidates write the gradients.
            for param, grad in zip(params, self._grads, strict=False):
                param.grad.copy_(grad.flatten()[: param.numel()].view_as(param))
            step()
        averages = [optimizer.state[p]["ema"] for p in params if "ema" in optimizer.state[p]]
        return [tensor.clone() for tensor in (*params, *averages)]
