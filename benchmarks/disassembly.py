"""Reads the machine code of a cubin, and checks its memory accesses.

ptxas translates PTX to machine code. No test of the source can find its mistakes, so these checks
read the machine code. They need nvdisasm, and for a built library cuobjdump, from PATH or from the
packages nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

__all__ = [
    "Instruction",
    "Loop",
    "MachineCode",
    "code_of_library",
    "disassembled",
    "read",
    "tool",
]

DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
# The part of an opcode that gives the size of an access; without one, it is 4 bytes.
ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "WIDE": 8, "128": 16, "256": 32}
GLOBAL = ("LD", "ST", "LDG", "STG", "ATOM", "ATOMG", "RED", "REDG")
SHARED = ("LDS", "STS", "ATOMS")
CONSTANT = ("LDC", "LDCU", "ULDC")
LOCAL = ("LDL", "STL")
# The immediate of a constant-bank access must be below this: see kMaxArgsEnd in
# csrc/cuda/launch.h.
IMMEDIATE_END = 0x8000


@dataclass(frozen=True)
class Instruction:
    """One instruction, as nvdisasm writes it: ``@P0 LDC.64 R2, c[0x0][R6+0x1a88]``."""

    text: str

    @property
    def opcode(self) -> str:
        """The opcode without predicate and operands: ``LDC.64``."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def parts(self) -> list[str]:
        """The opcode's parts: ``["LDC", "64"]``."""
        return self.opcode.split(".")

    @property
    def access_bytes(self) -> int:
        """Bytes that it reads from or writes to memory or a constant bank."""
        if re.match("D[A-Z]", self.opcode):  # arithmetic in double
            return 8
        return next((ACCESS_BYTES[part] for part in self.parts if part in ACCESS_BYTES), 4)

    @property
    def address(self) -> str:
        """The last operand in brackets: ``R6+0x1a88``."""
        found = re.findall(r"\[([^][]*)\]", self.text)
        return found[-1] if found else ""

    @property
    def immediate(self) -> int:
        """The immediate in the address, in bytes; 0 without one."""
        return sum(int(number, 16) for number in re.findall(r"-?0x[0-9a-f]+", self.address))


@dataclass(frozen=True)
class Loop:
    """An innermost loop, as the opcodes of its instructions."""

    opcodes: Sequence[str]

    def count(self, *opcodes: str) -> int:
        """Number of instructions whose opcode begins with one of these."""
        return sum(opcode.startswith(opcodes) for opcode in self.opcodes)

    @property
    def size(self) -> int:
        """Number of instructions."""
        return len(self.opcodes)

    @property
    def loads_at_once(self) -> list[int]:
        """Numbers of loads from global memory without a store between them, in order."""
        accesses = [o[:3] for o in self.opcodes if o.startswith(("LDG", "STG"))]
        return [len(list(run)) for kind, run in groupby(accesses) if kind == "LDG"]

    @property
    def vector_accesses(self) -> int:
        """Number of 16-byte loads and stores."""
        return self.count("LDG.E.128", "STG.E.128")


@dataclass(frozen=True)
class MachineCode:
    """All functions of a cubin.

    Attributes:
        architecture: Such as "80".
        instructions: The instructions of all functions.
        loops: The innermost loops.
        constant_bytes: Size of the largest constant bank of a kernel, which ends with the kernel's
            arguments.
        shared_alignment: Alignment of all kernels' shared memory, in bytes; 0 without shared
            memory.
    """

    architecture: str
    instructions: Sequence[Instruction]
    loops: Sequence[Loop]
    constant_bytes: int
    shared_alignment: int = 0

    def accesses(self, operations: Sequence[str]) -> list[Instruction]:
        """The instructions of these operations, such as "LDG"."""
        return [i for i in self.instructions if i.parts[0] in operations]

    @property
    def local_accesses(self) -> list[Instruction]:
        """Accesses to a thread's local memory: spilled registers and indexed arrays."""
        return self.accesses(LOCAL)

    @property
    def unknown_accesses(self) -> list[Instruction]:
        """Memory accesses with an operation or a size that the other checks do not know."""
        known = GLOBAL + SHARED + CONSTANT + LOCAL

        def is_unknown(instruction: Instruction) -> bool:
            operands = re.sub(r"\bcx?\[[^]]*\]\[[^]]*\]|\bdesc\[[^]]*\]", "", instruction.text)
            if instruction.parts[0] in known:
                sizes = [part for part in instruction.parts if re.fullmatch(r"[US]?\d+", part)]
                return not set(sizes) <= set(ACCESS_BYTES)
            return "[" in operands

        return list(filter(is_unknown, self.instructions))

    @property
    def misplaced_constants(self) -> list[Instruction]:
        """Constant-bank accesses that ptxas may have misplaced.

        The immediate is negative, or at least IMMEDIATE_END; or the address has no register, and
        the access ends after the kernel's arguments.
        """

        def is_misplaced(access: Instruction) -> bool:
            if not 0 <= access.immediate < IMMEDIATE_END:
                return True
            is_indexed = "R" in access.address
            return not is_indexed and access.immediate + access.access_bytes > self.constant_bytes

        constants = [i for i in self.instructions if re.search(r"\bcx?\[", i.text)]
        return list(filter(is_misplaced, constants))

    @property
    def narrow_addresses(self) -> list[Instruction]:
        """Global memory accesses whose address is not a sum of 64-bit registers."""
        # On 7.5 a single register needs no .64: there the opcode's E says it.
        optional = "?" if self.architecture == "75" else ""
        wide = re.compile(rf"(U?R\d+(\.64){optional}|R\d+\.64\+UR\d+)(\+-?0x[0-9a-f]+)?")
        return [
            access
            for access in self.accesses(GLOBAL)
            if "E" not in access.parts or not wide.fullmatch(access.address)
        ]

    @property
    def misaligned_accesses(self) -> list[Instruction]:
        """Accesses whose immediate is not a multiple of their size, and accesses to shared memory
        wider than its alignment.
        """
        accesses = self.accesses(GLOBAL + SHARED + CONSTANT)
        by_immediate = [access for access in accesses if access.immediate % access.access_bytes]
        wide = [a for a in self.accesses(SHARED) if a.access_bytes > self.shared_alignment]
        return by_immediate + wide

    @property
    def faults(self) -> dict[str, list[Instruction]]:
        """Accesses that no kernel may have, by kind of fault."""
        return {
            "unknown access": self.unknown_accesses,
            "local access": self.local_accesses,
            "misplaced constant": self.misplaced_constants,
            "narrow address": self.narrow_addresses,
            "misaligned access": self.misaligned_accesses,
        }

    def usual_loop(self, dtype: str, rounded: int = 0) -> Loop:
        """The loop with weight decay and Nesterov momentum, which updates two packs at once.

        Args:
            dtype: Dtype of parameter, gradient and buffer: "float32", "float64", "float16" or
                "bfloat16".
            rounded: How many of parameter and buffer are rounded stochastically.
        """

        elements = 2 * {"float32": 4, "float64": 2}.get(dtype, 8)
        fma = "DFMA" if dtype == "float64" else "FFMA"

        def fits(loop: Loop) -> bool:
            accesses = (loop.count("LDG"), loop.count("STG"), loop.count("LDS"))
            is_float16 = loop.count("HADD2.F32") > 0
            return (
                accesses == (6, 4, 2 * rounded)
                and loop.vector_accesses == 10
                and loop.count(fma) == 4 * elements
                and is_float16 == (dtype == "float16")
            )

        return min(filter(fits, self.loops), key=lambda loop: loop.size)


def tool(name: str) -> str | None:
    """Path of one of NVIDIA's tools, from their package for this Python or from PATH; or None."""
    packages = Path(sysconfig.get_path("purelib"))
    found = [*packages.glob(f"nvidia/*/bin/{name}")]
    return str(found[0]) if found else shutil.which(name)


def disassembled(cubin: Path) -> MachineCode:
    """Reads a cubin."""
    return read(_output("nvdisasm", str(cubin)))


def code_of_library(library: Path) -> list[MachineCode]:
    """Reads each kernel of each cubin in a shared library."""
    with tempfile.TemporaryDirectory() as folder:
        _output("cuobjdump", "--extract-elf", "all", str(library.resolve()), folder=folder)
        texts = [_output("nvdisasm", str(cubin)) for cubin in sorted(Path(folder).glob("*.cubin"))]
    return [read(kernel) for text in texts for kernel in kernels_of(text)]


def kernels_of(text: str) -> list[str]:
    """Splits a cubin's disassembly: kernels have shared memory of different alignment."""
    head, *sections = re.split(r"^(?=\s*\.section\s)", text, flags=re.M)
    names = re.findall(r"^\s*\.section\s+\.text\.([^,\s]+)", text, re.M)
    return [head + "".join(s for s in sections if f".{name}" in s.split(",")[0]) for name in names]


def _output(name: str, *arguments: str, folder: str | None = None) -> str:
    program = tool(name)
    if program is None:
        raise FileNotFoundError(f"there is no {name}; pip install nvidia-cuda-{name}")
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def read(text: str) -> MachineCode:
    """Parses nvdisasm's output for a cubin.

    Raises:
        ValueError: The text is not the disassembly of a cubin.
    """
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(Instruction(instruction[1]))
    target = re.search(r"\.target\s+sm_(\d+)", text)
    if target is None or not instructions:
        raise ValueError(f"not the disassembly of a cubin: {text[:200]!r}")
    arguments = re.findall(r"^\.nv\.constant0\.\S+:\s+\.zero\s+(\d+)", text, re.M)
    shared = re.findall(
        r"\.section\s+\.nv\.shared\.(?!reserved).*\n(?:\s+\.sectionflags.*\n)?\s+\.align\s+(\d+)",
        text,
    )
    return MachineCode(
        architecture=target[1],
        instructions=instructions,
        loops=_innermost_loops(instructions, labels),
        constant_bytes=max(map(int, arguments)),
        shared_alignment=min(map(int, shared), default=0),
    )


def _innermost_loops(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Loop]:
    spans = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction.text)
        if target and labels[target[1]] <= end:
            spans.append((labels[target[1]], end + 1))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    opcodes = [instruction.opcode for instruction in instructions]
    return [Loop(opcodes[begin:end]) for begin, end in innermost]
