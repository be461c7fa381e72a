"""What nvcc makes of the kernel, for every architecture that setup.py builds for."""

from __future__ import annotations

import os

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import DOUBLE, Kernel

# Kinds of dtypes, with and without: grad_scale; L2 decay; momentum, or none, or Nesterov's.
LOOPS_OF_A_TYPE = 2 * 2 * 3
TYPES = 7


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Compiled for all architectures; without the tools, skipped but for CI."""
    if missing := machine_code.missing_tool():
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return machine_code.compiled(machine_code.architectures())


@pytest.fixture(params=machine_code.architectures())
def kernel(kernels, request) -> Kernel:
    return next(kernel for kernel in kernels if kernel.architecture == request.param)


# Registers that a thread of each may have: 65536 shared by the threads that are to run at once.
MOST_REGISTERS = {"step": 65536 // (4 * 256), "step with extras": 128, "norm": 64}


@pytest.fixture(scope="module")
def other_kernels(kernels) -> dict[str, list[Kernel]]:
    """Those besides the plain step's."""
    names = machine_code.architectures()
    return {name: machine_code.compiled(names, name) for name in MOST_REGISTERS if name != "step"}


@pytest.mark.parametrize("name", ["step with extras", "norm"])
def test_the_other_kernels_spill_nothing_either(other_kernels, name) -> None:
    for kernel in other_kernels[name]:
        spilled = (kernel.spilled_bytes, kernel.stack_bytes, kernel.local_accesses)
        assert spilled == (0, 0, 0), kernel.architecture
        assert kernel.registers <= MOST_REGISTERS[name], kernel.architecture


def test_with_extras_only_float64_is_computed_in_double(other_kernels) -> None:
    for kernel in other_kernels["step with extras"]:
        loops = vector_loops(kernel)
        assert len(loops) == TYPES
        with_double = [loop for loop in loops if loop.count("DFMA")]
        assert len(with_double) == 1, kernel.architecture


def vector_loops(kernel: Kernel) -> list[machine_code.Loop]:
    return [loop for loop in kernel.loops if loop.count("STG.E.128")]


def test_nothing_is_spilled_and_no_local_memory_used(kernel) -> None:
    assert kernel.spilled_bytes == kernel.stack_bytes == kernel.local_accesses == 0
    assert kernel.registers <= MOST_REGISTERS["step"]


def test_every_load_and_store_of_a_vector_loop_has_16_bytes(kernel) -> None:
    loops = vector_loops(kernel)
    assert len(loops) == TYPES * LOOPS_OF_A_TYPE
    for loop in loops:
        assert loop.count("LDG", "STG") == loop.vector_accesses


def test_only_float64_is_computed_in_double(kernel) -> None:
    with_double = [loop for loop in vector_loops(kernel) if loop.count(*DOUBLE)]
    assert len(with_double) == LOOPS_OF_A_TYPE
    # Where there is grad_scale, the division takes a look at the exponents.
    assert all(loop.count("FFMA", "FMUL") <= 2 for loop in with_double)


def test_float32_moves_20_bytes_an_element_in_few_instructions(kernel) -> None:
    loop = kernel.usual_loop("float32")
    assert loop.count("LDG.E.128") == 3
    assert loop.count("STG.E.128") == 2
    # Four fma and a product for each of four elements.
    assert (loop.count("FFMA"), loop.count("FMUL")) == (16, 4)
    # Five accesses, three addresses, -0 for a first step, and the loop itself.
    assert loop.size <= 40


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_move_10_bytes_an_element(kernel, dtype) -> None:
    loop = kernel.usual_loop(dtype)
    assert loop.vector_accesses * 16 == 10 * 8
    assert (loop.count("FFMA"), loop.count("FMUL")) == (32, 8)
