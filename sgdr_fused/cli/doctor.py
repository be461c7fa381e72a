"""``sgdr-fused doctor``: says what is installed, and whether it works."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator

import torch

from sgdr_fused import native
from sgdr_fused.building.build import gpus_at_hand
from sgdr_fused.building.recipe import PACKAGE, covers, find_cuda
from sgdr_fused.cli.parser import Commands
from sgdr_fused.cli.self_test import CASES, faults
from sgdr_fused.version import __version__

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, and whether it works",
        description="Says what is installed, where the native backend comes from or why there is "
        "none, and tests it against the reference for some seconds. Exit status 1: something is "
        "wrong.",
    )
    parser.set_defaults(command=_doctor)


def _doctor(_: argparse.Namespace) -> None:
    for name, value in _findings():
        _say(name, value)
    problems = [*_problems_of_build(), *(fault for d in _devices() for fault in _self_test(d))]
    for problem in problems:
        _say("problem", problem)
    raise SystemExit(1 if problems else 0)


def _say(name: str, value: str) -> None:
    print(f"{name + ':':16}{value}", flush=True)


def _findings() -> Iterator[tuple[str, str]]:
    yield "sgdr_fused", f"{__version__} in {PACKAGE}"
    yield "Python", f"{platform.python_version()}, {platform.machine()}, {platform.system()}"
    yield "torch", f"{torch.__version__}, {_cuda_of_torch()}"
    yield "CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {major}.{minor}"
    if native.built_for is None:
        yield "native backend", f"none: {native.why_missing}"
        return
    yield "native backend", str(native.folder)
    yield "CUDA backend", native.built_for.cuda_architectures or _why_no_cuda()


def _cuda_of_torch() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def _why_no_cuda() -> str:
    toolkit, why = find_cuda(torch.version.cuda)
    return "none; it was not built then, but could be now" if toolkit else f"none: {why}"


def _problems_of_build() -> Iterator[str]:
    if native.built_for is None:
        yield f"the steps are in plain PyTorch, which is slow; {native.HOW_TO_BUILD}"
    elif without_code := [gpu for gpu in gpus_at_hand() if not _covers(gpu)]:
        names = ", ".join(f"{major}.{minor}" for major, minor in without_code)
        yield f"no code for a GPU of compute capability {names}; {native.HOW_TO_BUILD}"


def _covers(gpu: tuple[int, int]) -> bool:
    return native.built_for is not None and covers(native.built_for.cuda_architectures, gpu)


def _devices() -> list[str]:
    """Those that the native backend can step on."""
    if native.built_for is None:
        return []
    gpus = range(torch.cuda.device_count() if gpus_at_hand() else 0)
    fit = [gpu for gpu in gpus if _covers(torch.cuda.get_device_capability(gpu))]
    return ["cpu", *(f"cuda:{gpu}" for gpu in fit)]


def _self_test(device: str) -> list[str]:
    begin = time.monotonic()
    found = [f"{device}: {fault}" for fault in faults(device)]
    result = f"{len(found)} faults" if found else "passed"
    _say("self-test", f"{result} on {device}: {len(CASES)} cases, {time.monotonic() - begin:.1f} s")
    return found
