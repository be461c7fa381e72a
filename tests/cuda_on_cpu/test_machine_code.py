"""The machine code of the kernels, for every architecture that the package is built for.

make test looks at one of them, make test-all at each.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import disassembly, machine_code
from benchmarks.disassembly import DOUBLE, Instruction, Loop, MachineCode
from benchmarks.machine_code import SOURCES, Kernel
from sgdr_fused import native

# With and without L2 decay; momentum, or none, or Nesterov's.
LOOPS_OF_A_TYPE = 2 * 3
# Loops that store 16 bytes at once, for each mixture of dtypes that has loops of its own; and how
# many blocks of 256 threads share a multiprocessor's 65536 registers. bfloat16 with a float32
# momentum buffer stores 8 bytes at once in the two loops without momentum.
LOOPS_AND_BLOCKS = {
    "step": (6 * LOOPS_OF_A_TYPE - 2, 4),
    "step with averages": (6 * LOOPS_OF_A_TYPE, 2),
    "step with rounding": (6 * LOOPS_OF_A_TYPE - 2, 3),
    "step with master weights": (3 * LOOPS_OF_A_TYPE, 3),
    "step with all of these": (6 * LOOPS_OF_A_TYPE, 2),
    "norm": (0, 4),
}
WITH_MASTERS = ("step with master weights", "step with all of these")
IN_MAKE_TEST = "90"
ARCHITECTURES = [
    pytest.param(name, marks=() if name == IN_MAKE_TEST else pytest.mark.exhaustive)
    for name in machine_code.architectures()
]


def require(missing: str) -> None:
    """Skips the test if a tool is missing; in CI that is a failure."""
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> str:
    """Such as "80"."""
    return request.param


@pytest.fixture(scope="module")
def kernels(architecture) -> dict[str, Kernel]:
    """All kernels of an architecture, by name."""
    require(machine_code.missing_tool())

    def compiled(name: str) -> Kernel:
        return machine_code.compiled([architecture], name)[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SOURCES, pool.map(compiled, SOURCES), strict=True))


@pytest.fixture(params=SOURCES)
def name(request) -> str:
    return request.param


@pytest.fixture
def kernel(kernels, name) -> Kernel:
    """Each kernel."""
    return kernels[name]


@pytest.fixture
def step_code(kernels) -> MachineCode:
    """The machine code of the step without extras."""
    return kernels["step"].code


def vector_loops(code: MachineCode) -> list[Loop]:
    return [loop for loop in code.loops if loop.count("STG.E.128")]


# ------------------------------------------------------------------------------------- every kernel


def assert_has_no_fault(code: MachineCode) -> None:
    for fault, found in code.faults.items():
        assert not found, f"sm_{code.architecture}, {fault}: {found[0].text}"


def test_kernel_has_no_faulty_access(kernel) -> None:
    assert_has_no_fault(kernel.code)


def test_arguments_end_where_every_instruction_reaches_them(kernel) -> None:
    assert 0 < kernel.code.constant_bytes <= disassembly.IMMEDIATE_END


def test_arguments_begin_no_later_than_launch_h_says(architecture) -> None:
    """The bound of their size is computed from this."""
    require(machine_code.missing_tool())
    texts = [path.read_text() for path in (machine_code.REPOSITORY / "csrc/cuda").glob("*.h")]
    begins = re.findall(r"kMaxArgsBegin = (0x\w+);", "".join(texts))
    assert len(begins) == 1
    program = 'struct Args { char bytes[8192]; };\nextern "C" __global__ void kernel(Args args) {}'
    found = machine_code.compiled_source(architecture, program).code.constant_bytes - 8192
    assert found <= int(begins[0], 16)


def test_kernel_spills_no_registers(kernel, name) -> None:
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    blocks = LOOPS_AND_BLOCKS[name][1]
    assert kernel.registers <= 65536 // (blocks * 256)


def test_ticket_is_drawn_between_two_fences(kernel) -> None:
    """The last block reads what the others wrote: see is_last_block() in csrc/cuda/blocks.cuh."""
    drawn = [i.parts for i in kernel.code.accesses(("MEMBAR", "ATOMG", "ATOM", "RED"))]
    assert [parts[0] for parts in drawn] == ["MEMBAR", "ATOMG", "MEMBAR"]
    assert all("GPU" in parts for parts in drawn)


def test_read_only_cache_is_not_used_for_what_a_launch_writes(kernel, name) -> None:
    """That cache does not see writes. Only the cosine's constant table is read by 16 bytes."""
    incoherent = [i for i in kernel.code.accesses(("LDG",)) if "CONSTANT" in i.parts]
    assert all(i.access_bytes == 16 for i in incoherent)
    assert bool(incoherent) == (name != "norm")


# -------------------------------------------------------------------------------- the element loops


def test_published_results_match_this_code(kernel, name) -> None:
    """benchmarks/results/machine_code.json, but for what another nvcc may count otherwise."""
    found = machine_code.row_of(name, kernel)
    keys = ("kernel", "architecture", "spilled_bytes", "constant_bytes", "faults")
    published = [
        {key: row[key] for key in keys} for row in json.loads(machine_code.RESULT.read_text())
    ]
    assert published.count({key: found[key] for key in keys}) == 1
    assert len(published) == len(SOURCES) * len(ARCHITECTURES)


def test_loops_of_packs_keep_two_packs_in_flight(kernel, name) -> None:
    """All loads come before the first store, so that those of both packs are under way at once."""
    loops = vector_loops(kernel.code)
    assert len(loops) == LOOPS_AND_BLOCKS[name][0]
    # Of parameter and gradient at least, and of the average.
    least = 2 * (3 if name == "step with averages" else 2)
    for loop in loops:
        # The first step of a master copy loads the parameter, too, behind a branch.
        loads = loop.loads_at_once[:1] if name in WITH_MASTERS else loop.loads_at_once
        assert all(n >= least for n in loads), loop.opcodes


def test_loops_of_one_dtype_take_16_bytes_at_once(step_code) -> None:
    # Compilers may unroll a loop once more.
    whole = [loop for loop in vector_loops(step_code) if loop.vector_accesses in (6, 10, 12, 20)]
    assert len(whole) >= 4 * LOOPS_OF_A_TYPE  # four dtypes


def test_only_float64_is_computed_in_double(step_code) -> None:
    with_double = [loop for loop in vector_loops(step_code) if loop.count(*DOUBLE)]
    assert len(with_double) == LOOPS_OF_A_TYPE
    assert not any(loop.count("FFMA", "FMUL") for loop in with_double)


def test_float32_moves_20_bytes_an_element_in_few_instructions(step_code) -> None:
    loop = step_code.usual_loop("float32")
    assert loop.count("LDG.E.128") == 6
    assert loop.count("STG.E.128") == 4
    # Four fma and a product for each of eight elements; and two products if grads are scaled.
    assert (loop.count("FFMA"), loop.count("FMUL")) == (32, 8 + 16)
    # Ten accesses, their addresses, and the loop itself.
    assert machine_code.instructions_per_element(loop, "float32") <= 10.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_move_10_bytes_an_element(step_code, architecture, dtype) -> None:
    loop = step_code.usual_loop(dtype)
    assert machine_code.bytes_per_element(loop, dtype) == 10
    assert (loop.count("FFMA"), loop.count("FMUL")) == (64, 16 + 32)
    if architecture != "75" or dtype == "float16":  # 7.5 converts to bfloat16 by hand
        assert machine_code.instructions_per_element(loop, dtype) <= 14.5


def test_stochastic_rounding_takes_few_instructions(kernels) -> None:
    """Of parameter and momentum buffer; a bfloat16 element moves half the bytes of a float32."""
    loop = kernels["step with rounding"].code.usual_loop("bfloat16", rounded=2)
    assert machine_code.instructions_per_element(loop, "bfloat16") <= 24


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_denormal_numbers_are_kept_and_rounding_is_to_nearest(step_code, dtype) -> None:
    """Fast-math flags would change the bits on a GPU only."""
    arithmetic = [
        opcode.split(".")
        for opcode in step_code.usual_loop(dtype).opcodes
        if opcode.startswith(("FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD"))
    ]
    assert arithmetic
    assert all(len(parts) == 1 for parts in arithmetic), arithmetic


# -------------------------------------------------------------------------------- the built library


def test_built_extension_has_no_faulty_access() -> None:
    """The machine code that a GPU runs, for every architecture it was built for."""
    if native.extension is None or not native.extension.has_cuda:
        pytest.skip("the extension is built without its CUDA backend")
    for name in ("cuobjdump", "nvdisasm"):
        if disassembly.tool(name) is None:
            require(f"there is no {name}; pip install nvidia-cuda-{name}")
    codes = disassembly.code_of_library(Path(native.extension.__file__))
    n_kernels = 7 + 3  # of the step and of the norm, by their arguments
    assert len(codes) >= n_kernels
    assert len(codes) % n_kernels == 0  # all for each architecture
    for code in codes:
        assert_has_no_fault(code)
        assert code.constant_bytes <= disassembly.IMMEDIATE_END


# ------------------------------------------------------------------ that the checks find the faults

# Groups that are counted from the end of the arguments, as in LaunchArgs.
GROUPS_AT_THE_END = """
struct Group {{ double lr; double* out; }};
struct Args {{ int count; alignas(8) unsigned char payload[{} - 8]; }};
__global__ void kernel(const __grid_constant__ Args args) {{
  auto* const end = reinterpret_cast<const Group*>(args.payload + sizeof(args.payload));
  for (int i = threadIdx.x; i < args.count; i += blockDim.x) *end[-1 - i].out = end[-1 - i].lr;
}}
"""


@pytest.mark.parametrize(
    ("architecture", "n_bytes", "is_faulty"),
    [
        ("90", 32760, True),  # ignored the momentum on an H100
        ("90", 31816, False),  # was right there
        ("80", 31816, True),  # other architectures' arguments begin elsewhere
        ("80", 25968, False),
    ],
)
def test_constant_beyond_an_immediates_reach_is_found(architecture, n_bytes, is_faulty) -> None:
    require(machine_code.missing_tool())
    code = machine_code.compiled_source(architecture, GROUPS_AT_THE_END.format(n_bytes)).code
    assert bool(code.faults["misplaced constant"]) == is_faulty
    assert (code.constant_bytes > disassembly.IMMEDIATE_END) == is_faulty
    assert not any(found for name, found in code.faults.items() if name != "misplaced constant")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("unknown access", "LDGSTS.E.BYPASS.128 [R5+0x3], desc[UR4][R2.64]"),
        ("unknown access", "LDSM.16.M88.4 R4, [R2+0x4]"),
        ("unknown access", "UBLKCP.S.G [UR8], [UR4], UR6"),
        ("unknown access", "LDG.E.512 R4, desc[UR4][R2.64]"),
        ("local access", "@!P0 STL.64 [R1+0x8], R4"),
        ("misplaced constant", "LDC.64 R6, c[0x0][R20+-0x7df8]"),
        ("misplaced constant", "LDCU.64 UR6, c[0x0][UR4+0x8000]"),
        ("misplaced constant", "ISETP.NE.AND P0, PT, RZ, c[0x0][0x6704], PT"),
        ("misplaced constant", "LDC.64 R2, c[0x0][0x6700]"),
        ("misplaced constant", "DFMA R2, R4, c[0x0][0x6700], R6"),
        ("misplaced constant", "IMAD.WIDE.U32 R28, R0, R29, c[0x0][0x6700]"),
        ("misplaced constant", "LDC.64 R2, cx[UR4][R2+UR6+-0x8]"),
        ("narrow address", "LDG.E R0, desc[UR4][R2]"),
        ("narrow address", "STG.E.128 desc[UR4][R2.U32+UR6], R4"),
        ("narrow address", "ATOMG.INC.STRONG.GPU PT, R2, desc[UR8][R2.64], R5"),
        ("misaligned access", "STS.64 [UR5+0x24], R4"),
        ("misaligned access", "STS.128 [UR5+0x20], R4"),
        ("misaligned access", "LDG.E.64 R0, desc[UR4][R2.64+-0x4]"),
        ("misaligned access", "@P1 LDC.U16 R0, c[0x0][R2+0x211]"),
    ],
)
def test_every_kind_of_faulty_access_is_found(fault, text) -> None:
    right = [
        "LDC.64 R6, c[0x0][R20+0x66f8]",
        "@P0 LDG.E.128 R0, desc[UR4][R2.64+-0x2000]",
        "STS.U8 [UR4+0x3], R0",
        "FMUL R0, R1, c[0x0][0x6700]",
        "BRA `(.L_x_3)",
    ]
    instructions = [Instruction(t) for t in [*right, text]]
    code = MachineCode("90", instructions, [], constant_bytes=0x6704, shared_alignment=8)
    found = {name: [i.text for i in faulty] for name, faulty in code.faults.items() if faulty}
    assert found == {fault: [text]}


def test_text_other_than_a_disassembly_is_an_error() -> None:
    with pytest.raises(ValueError, match="not the disassembly"):
        disassembly.read("nvdisasm fatal   : bad file")
    assert disassembly.tool("no such tool") is None
