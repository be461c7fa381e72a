"""cuda_shim.h runs kernels as CUDA defines it, and each planted bug is caught."""

from __future__ import annotations

import re
import subprocess

import pytest
from fake_cuda import FOLDER, shim_program

pytestmark = pytest.mark.exhaustive

PLAIN = ""
ADDRESS = "address,undefined"
THREAD = "thread"

BUGS = re.findall(r"^  k(\w+),", (FOLDER / "toy_kernels.cuh").read_text(), re.M)


def run_toy(sanitize: str, bug: str, *, seeds: int = 10) -> subprocess.CompletedProcess[str]:
    program = shim_program(FOLDER / "toy_main.cpp", sanitize=sanitize)
    command = [str(program), str(BUGS.index(bug)), str(seeds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("sanitize", [PLAIN, ADDRESS, THREAD])
def test_shim_does_what_cuda_defines(sanitize: str) -> None:
    program = shim_program(FOLDER / "shim_check.cpp", sanitize=sanitize)
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("sanitize", [PLAIN, ADDRESS, THREAD])
def test_right_kernel_passes_in_every_order_and_under_every_sanitizer(sanitize: str) -> None:
    ran = run_toy(sanitize, "None")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "0 of 10 seeds gave a wrong result\n"


@pytest.mark.parametrize(
    ("sanitize", "bug", "said"),
    [
        (ADDRESS, "OutOfBounds", "heap-buffer-overflow"),
        (ADDRESS, "SharedOutOfBounds", "index 2 out of bounds"),
        (ADDRESS, "Misaligned", "misaligned address"),
        (PLAIN, "UninitialisedShared", "10 of 10 seeds gave a wrong result"),
        (THREAD, "MissingBarrier", "data race"),
        (THREAD, "MissingWarpSync", "data race"),
        (THREAD, "MissingReleaseFence", "data race"),
        (THREAD, "MissingAcquireFence", "data race"),
        (THREAD, "MissingTicket", "data race"),
        (PLAIN, "MissingTicket", r"[1-9] of 10 seeds gave a wrong result"),
        (PLAIN, "DivergentBarrier", "threads of one block wait at different __syncthreads"),
        (PLAIN, "BarriersInBothBranches", "threads of one block wait at different __syncthreads"),
        (PLAIN, "BarrierAfterReturn", "that some threads never reach"),
    ],
)
def test_planted_bug_is_caught(sanitize: str, bug: str, said: str) -> None:
    ran = run_toy(sanitize, bug)
    assert ran.returncode != 0
    assert re.search(said, ran.stdout + ran.stderr), ran.stdout + ran.stderr
