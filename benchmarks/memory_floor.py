"""A bare loop of a step's loads and stores: a lower bound on a step's time."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from benchmarks.harness import Clock, LocalCandidate
from benchmarks.workload import Workload

__all__ = ["FLOOR", "floor_candidates"]

FLOOR = "memory floor"
CHUNK_NUMELS = (1 << 12, 1 << 14, 1 << 16)


class _Tensors(ctypes.Structure):
    """``Tensors`` of memory_floor.cpp."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("momentum_buffers", ctypes.c_void_p),
        ("numels", ctypes.c_void_p),
    )


def floor_candidates(workload: Workload, clock: Clock) -> list[LocalCandidate]:
    """The loop with several chunk sizes, distributed over the threads in two ways.

    The fastest is the floor; which one that is depends on the machine.

    Args:
        workload: Parameters and gradients.
        clock: Times the loop.
    """
    library = _compiled()
    momentum_buffers = [torch.zeros_like(param) for param in workload.params]
    columns = (
        _pointers(workload.params),
        _pointers([param.grad for param in workload.params]),
        _pointers(momentum_buffers),
        torch.tensor([param.numel() for param in workload.params]),
    )
    tensors = _Tensors(len(workload.params), *(column.data_ptr() for column in columns))

    def call(chunk_numel: int, in_turn: int) -> Callable[[], object]:
        def step(keep_alive: object = (columns, momentum_buffers)) -> None:
            library.memory_floor(ctypes.byref(tensors), ctypes.c_int64(chunk_numel), in_turn)

        return step

    return [
        LocalCandidate(f"{FLOOR}, chunks of {numel}{form}", call(numel, in_turn), clock)
        for numel in CHUNK_NUMELS
        for in_turn, form in enumerate(("", ", in turn"))
    ]


def _pointers(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


@functools.cache
def _compiled() -> ctypes.CDLL:
    """Compiles memory_floor.cpp into torch's cache folder for extensions."""
    path = cpp_extension.load(
        name="sgdr_memory_floor",
        sources=[str(Path(__file__).with_suffix(".cpp"))],
        # Without -fopenmp at::parallel_for is a plain loop. Not a linker flag: that would load a
        # second OpenMP.
        extra_cflags=["-O3", "-march=native", "-fopenmp"],
        is_python_module=False,
    )
    return ctypes.CDLL(path)
