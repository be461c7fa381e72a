"""Runs the kernels under the shim beside the reference, and compares them bit for bit.

A case is a sequence of steps of an optimizer. `kernel_main.cpp` reads it from a file, takes the
same steps by the kernels, and writes the results after each step to another file.
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgdr_fused import FusedSGDR
from sgdr_fused.groups import position_of, sync_group
from sgdr_fused.reference import Clipping, reference_step
from sgdr_fused.reference.norm import norm_of, sum_of_squares
from sgdr_fused.tensors import dtypes_of_state

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # as in ElementType
NO_TYPE = len(TYPES)
ROLES = ("momentum_buffer", "ema", "master_param")  # besides parameter and gradient
ENDLESS = 2**63 - 1


def values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, with zeros of both signs and tiny numbers among them."""
    x = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for place, special in enumerate((0.0, -0.0, 1e-40, -1e-40, 1e-7)):
        x[1 + place :: 11] = special
    return x.to(dtype)


def raw(tensor: Tensor) -> bytes:
    """The tensor's elements as bytes."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Outcome:
    """The results of a step: a name for each number or tensor, and its bytes."""

    parts: list[tuple[str, bytes | int]] = field(default_factory=list)  # int: that many, unknown

    def add(self, name: str, content: bytes | int) -> None:
        """Adds the next bytes of the result file; a number says how many bytes to ignore."""
        self.parts.append((name, content))


class Case:
    """An optimizer whose steps the reference takes and which records them for the kernel.

    Args:
        groups: Param groups; each has what FusedSGDR takes.
        offsets: For parameter number i: by how many bytes its memory, its gradient's and those of
            its ROLES are off the alignment; missing ones are 0.
        grad_dtypes: For parameter number i, if not its own.
        momentum_dtypes: For parameter number i, of a buffer that is there from the start.
        clipping: Options of the whole optimizer; may be set between steps.
        threads: Of a block; fewer than on a GPU are faster here.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        offsets: Callable[[int], Sequence[int]] = lambda i: (0, 0, 0),
        grad_dtypes: Sequence[torch.dtype] | None = None,
        momentum_dtypes: Sequence[torch.dtype] | None = None,
        clipping: Clipping | None = None,
        threads: int = 64,
    ) -> None:
        options = {"lr": 0.1, "T_0": 5, "T_mult": 2}
        self.optimizer = FusedSGDR(
            [options | group for group in groups], **options, backend="reference"
        )
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._steps: list[bytes] = []
        self._outcomes: list[Outcome] = []
        self.clipping = clipping or Clipping()
        self.launches: list[int] = []
        self.norm_launches: list[int] = []
        self._threads = threads
        for i, dtype in enumerate(momentum_dtypes or []):
            buffer = values(self.params[i].numel(), dtype, 77 + i)
            self.optimizer.state[self.params[i]]["momentum_buffer"] = buffer
        self._options_before = [self._schedule(group) for group in self.optimizer.param_groups]
        self._grad_dtypes = list(grad_dtypes or [param.dtype for param in self.params])
        self._offsets = offsets
        self.begin()

    def begin(self) -> None:
        """Records the optimizer's state; call it again after a change by hand."""
        self._start = self._header(self._offsets)

    def step(
        self,
        grads: Sequence[Tensor | None],
        *,
        grad_scale: float | None = None,
        found_inf: float | None = None,
    ) -> None:
        """One step; param_groups may have been changed before it."""
        limit = self.clipping.max_grad_norm
        step = [
            struct.pack("<BfBf", grad_scale is not None, grad_scale or 0,
                        found_inf is not None, found_inf or 0),
            struct.pack("<BdB", self.clipping.needs_norm, math.inf if limit is None else limit,
                        self.clipping.skip_nonfinite),
        ]  # fmt: skip
        for i, group in enumerate(self.optimizer.param_groups):
            is_set = group["lr"] != group["scheduled_lr"]
            anew = self._schedule(group) != self._options_before[i]
            if anew:
                sync_group(group)
            step += [self._schedule(group), self._options(group, anew)]
            step.append(struct.pack("<Bd", 1, group["lr"]) if is_set else b"\0")
        for param, grad in zip(self.params, grads, strict=True):
            step.append(b"\0" if grad is None else b"\1" + raw(grad))
            param.grad_dtype = None
            param.grad = grad
        self._steps.append(b"".join(step))
        scale = 1.0 if grad_scale is None else grad_scale
        groups = self.optimizer.param_groups
        if found_inf:
            for group in groups:
                group["skipped_steps"] += 1
        else:
            reference_step(groups, self.optimizer.state, scale, self.clipping)
        self._options_before = [self._schedule(group) for group in self.optimizer.param_groups]
        norm = norm_of([sum_of_squares(g for g in grads if g is not None)], scale)
        self._outcomes.append(self._outcome(norm))

    def steps(self, count: int, **options: Any) -> None:
        """A number of steps in which every parameter has a gradient."""
        for _ in range(count):
            self.step(self.some_grads(), **options)

    def some_grads(self) -> list[Tensor]:
        """A new gradient for each parameter."""
        seed = 1000 * (len(self._steps) + 1)
        return [
            values(p.numel(), self._grad_dtypes[i], seed + i) for i, p in enumerate(self.params)
        ]

    def difference(
        self,
        program: Path,
        folder: Path,
        *,
        seed: int = 1,
        bug: str = "",
    ) -> str:
        """Lets the kernel do the same; empty if the result is the same, bit for bit.

        Else the first difference, or what the sanitizers said. `bug` is one that is planted in the
        program.
        """
        case, result = folder / "case", folder / "result"
        with case.open("wb") as file:
            file.write(struct.pack("<2I", seed, self._threads))
            file.write(self._start + struct.pack("<I", len(self._steps)))
            file.writelines(self._steps)
        ran = subprocess.run(
            [str(program), str(case), str(result)],
            env=os.environ | {"PLANTED_BUG": bug},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if ran.returncode != 0:
            return f"exit status {ran.returncode}\n{ran.stdout}{ran.stderr}"
        return self._compare(result.read_bytes())

    def _compare(self, found: bytes) -> str:
        at = 0
        self.launches, self.norm_launches = [], []
        for number, outcome in enumerate(self._outcomes):
            norm_launches, launches = struct.unpack_from("<2I", found, at)
            self.norm_launches.append(norm_launches)
            self.launches.append(launches)
            at += 8
            for name, content in outcome.parts:
                if isinstance(content, int):
                    at += content
                    continue
                if found[at : at + len(content)] != content:
                    return f"step {number}: {name} differs"
                at += len(content)
        return "" if at == len(found) else "the result has another length"

    def _header(
        self,
        offsets: Callable[[int], Sequence[int]],
    ) -> bytes:
        header = [struct.pack("<I", len(self.optimizer.param_groups))]
        for group in self.optimizer.param_groups:
            header.append(self._group_state(group))
            header.append(struct.pack("<I", len(group["params"])) + self._param_states(group))
        header.append(struct.pack("<I", len(self.params)))
        number = 0
        for g, group in enumerate(self.optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                of_param = self.optimizer.state[param]
                found = {role: of_param[role].dtype for role in ROLES if role in of_param}
                dtypes = dtypes_of_state(group, param) | found
                types = [TYPES.index(param.dtype), TYPES.index(self._grad_dtypes[number])]
                types += [TYPES.index(dtypes[r]) if r in dtypes else NO_TYPE for r in ROLES]
                places = [*offsets(number), 0, 0, 0][: len(types)]
                header.append(struct.pack("<3I10B", g, index, param.numel(), *types, *places))
                header.append(b"\1" + raw(param))
                header += [
                    b"\1" + raw(of_param[role]) if role in of_param else b"\0" for role in ROLES
                ]
                number += 1
        return b"".join(header)

    def _outcome(self, norm: float) -> Outcome:
        outcome = Outcome()
        outcome.add("the ticket", bytes(4))
        if self.clipping.needs_norm:
            outcome.add("the norm", struct.pack("<d", norm))
        for g, group in enumerate(self.optimizer.param_groups):
            state = self._group_state(group)
            outcome.add(f"the position of group {g}", state[:32])
            outcome.add(f"the LR of group {g}", state[32:40])
            outcome.add(f"the scheduled LR of group {g}", state[40:48])
            outcome.add(f"the number of skipped steps of group {g}", state[48:])
            for index, of_param in enumerate(self._states_of_params(group)):
                outcome.add(f"the state of group {g}'s parameter {index}", of_param)
        groups = [g for g in self.optimizer.param_groups for _ in g["params"]]
        for i, (group, param) in enumerate(zip(groups, self.params, strict=True)):
            outcome.add(f"parameter {i}", raw(param))
            of_param = self.optimizer.state[param]
            dtypes = dtypes_of_state(group, param)
            for role in ROLES:
                if of_param.get(role) is not None:
                    outcome.add(f"{role} {i}", raw(of_param[role]))
                elif role in dtypes:
                    outcome.add(f"{role} {i}", param.numel() * dtypes[role].itemsize)
        return outcome

    @staticmethod
    def _group_state(group: dict[str, Any]) -> bytes:
        lrs = group["lr"], group["scheduled_lr"]
        return struct.pack("<4q2dq", *position_of(group), *lrs, group["skipped_steps"])

    def _param_states(self, group: dict[str, Any]) -> bytes:
        return b"".join(self._states_of_params(group))

    def _states_of_params(self, group: dict[str, Any]) -> Iterator[bytes]:
        for param in group["params"]:
            of_param = self.optimizer.state[param]
            is_empty = [role not in of_param for role in ROLES]
            yield struct.pack("<4BI", *is_empty, 0, of_param.get("n_averaged", 0))

    @staticmethod
    def _options(group: dict[str, Any], anew: bool) -> bytes:
        ema_decay = group["ema_decay"]
        decay = 0 if group["weight_decay"] != 0 and not group["decoupled_weight_decay"] else 1
        direction = 0 if group["momentum"] == 0 else 2 if group["nesterov"] else 1
        averaging = 0 if ema_decay is None else 2 if ema_decay == "swa" else 1
        return struct.pack(
            "<4dQ8B",
            *(group["momentum"], group["dampening"], group["weight_decay"]),
            ema_decay if averaging == 1 else 0,
            group["seed"],
            *(decay, direction, anew, averaging, group["maximize"], group["reset_momentum"]),
            group["stochastic_rounding"],
            group["stochastic_rounding"] or group["momentum_dtype"] is not None,
        )

    @staticmethod
    def _schedule(group: dict[str, Any]) -> bytes:
        epoch = group["steps_per_epoch"]
        return struct.pack(
            "<5d4q",
            *(group["initial_lr"], group["eta_min"], group["T_mult"], group["cycle_decay"]),
            group["warmup_start_lr"],
            group["T_0"] * epoch,
            epoch if group["anneal"] == "epoch" else 1,
            group["warmup_steps"],
            ENDLESS if group["n_cycles"] is None else group["n_cycles"],
        )


def params(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters of these sizes."""
    return [torch.nn.Parameter(values(n, dtype, seed + i)) for i, n in enumerate(sizes)]
