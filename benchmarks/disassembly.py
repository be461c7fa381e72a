"""What stands in a cubin, and whether its accesses to memory can be trusted.

ptxas translates PTX to machine code. What it gets wrong there is in no source that a test compiles,
so these checks read the machine code itself. They need nvdisasm, and for a built library cuobjdump,
from PATH or the packages nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

CONVERSIONS = ("HADD2", "F2F", "PRMT", "SHF", "SHL", "IMAD.U32", "IMAD.SHL")
DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
# The part of an opcode that tells the size of an access; without one, it is 4 bytes.
ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "WIDE": 8, "128": 16, "256": 32}
GLOBAL = ("LD", "ST", "LDG", "STG", "ATOM", "ATOMG", "RED", "REDG")
SHARED = ("LDS", "STS", "ATOMS")
CONSTANT = ("LDC", "LDCU", "ULDC")
LOCAL = ("LDL", "STL")
# An immediate of a constant-bank access is below: see kMaxArgsEnd in csrc/cuda/launch.h.
IMMEDIATE_END = 0x8000


@dataclass(frozen=True)
class Instruction:
    """One instruction, as nvdisasm writes it: ``@P0 LDC.64 R2, c[0x0][R6+0x1a88]``."""

    text: str

    @property
    def opcode(self) -> str:
        """Without predicate and operands: ``LDC.64``."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def parts(self) -> list[str]:
        """The opcode's parts: ``["LDC", "64"]``."""
        return self.opcode.split(".")

    @property
    def access_bytes(self) -> int:
        """How many bytes it reads from memory or a constant bank, or writes there."""
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
        """The number in the address."""
        return sum(int(number, 16) for number in re.findall(r"-?0x[0-9a-f]+", self.address))


@dataclass(frozen=True)
class Loop:
    """An innermost loop, as the number of times that each instruction stands in it."""

    instructions: Mapping[str, int]

    def count(self, *opcodes: str) -> int:
        """How many instructions begin with one of these."""
        return sum(n for name, n in self.instructions.items() if name.startswith(opcodes))

    @property
    def size(self) -> int:
        """How many instructions there are."""
        return sum(self.instructions.values())

    @property
    def vector_accesses(self) -> int:
        """Loads and stores of 16 bytes."""
        return self.count("LDG.E.128", "STG.E.128")

    @property
    def dtype(self) -> str:
        """The parameter's dtype: "half" stands for all that is converted."""
        if self.count("DFMA"):
            return "float64"
        return "half" if self.count(*CONVERSIONS) else "float32"


@dataclass(frozen=True)
class MachineCode:
    """All functions of a cubin.

    Attributes:
        architecture: Such as "80".
        instructions: Of all functions.
        loops: The innermost ones.
        constant_bytes: The size of the largest constant bank of a kernel; the kernel's arguments
            are the last part of it.
        shared_alignment: What all kernels' shared memory is aligned to, in bytes; 0: there is none.
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
        """Accesses to memory by an operation, or of a size, that the other checks do not know."""
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
        """Accesses to a constant bank that ptxas may have got wrong.

        The immediate is negative, or IMMEDIATE_END or more; or there is no register with it, and
        the access ends behind the kernel's arguments.
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
        """Accesses to global memory whose address is not the sum of 64-bit registers."""
        # A lone register may do without .64 on 7.5: there the opcode's E says it.
        optional = "?" if self.architecture == "75" else ""
        wide = re.compile(rf"(U?R\d+(\.64){optional}|R\d+\.64\+UR\d+)(\+-?0x[0-9a-f]+)?")
        return [
            access
            for access in self.accesses(GLOBAL)
            if "E" not in access.parts or not wide.fullmatch(access.address)
        ]

    @property
    def misaligned_accesses(self) -> list[Instruction]:
        """Accesses whose immediate is no multiple of their size, or to shared memory that is
        aligned to less than it.
        """
        accesses = self.accesses(GLOBAL + SHARED + CONSTANT)
        by_immediate = [access for access in accesses if access.immediate % access.access_bytes]
        wide = [a for a in self.accesses(SHARED) if a.access_bytes > self.shared_alignment]
        return by_immediate + wide

    @property
    def faults(self) -> dict[str, list[Instruction]]:
        """What no kernel may have, by its name."""
        return {
            "unknown access": self.unknown_accesses,
            "local access": self.local_accesses,
            "misplaced constant": self.misplaced_constants,
            "narrow address": self.narrow_addresses,
            "misaligned access": self.misaligned_accesses,
        }

    def usual_loop(self, dtype: str) -> Loop:
        """The loop with weight decay and Nesterov momentum, without grad_scale or clipping.

        Args:
            dtype: "float32", "float64", "float16" or "bfloat16", for parameter, gradient and
                buffer.
        """

        def fits(loop: Loop) -> bool:
            if loop.count("MUFU", "CALL") or (loop.count("LDG"), loop.count("STG")) != (3, 2):
                return False
            if dtype in ("float32", "float64"):
                return loop.dtype == dtype
            is_float16 = loop.count("HADD2.F32") > 0
            return loop.dtype == "half" and is_float16 == (dtype == "float16")

        # The one with the most to compute, and of those the one that does not scale.
        return max(filter(fits, self.loops), key=lambda o: (o.count("FFMA", "DFMA"), -o.size))


def tool(name: str) -> str | None:
    """Where one of NVIDIA's tools is: in their package for this Python, or on PATH."""
    packages = Path(sysconfig.get_path("purelib"))
    found = [*packages.glob(f"nvidia/*/bin/{name}")]
    return str(found[0]) if found else shutil.which(name)


def disassembled(cubin: Path) -> MachineCode:
    """Reads a cubin."""
    return read(_output("nvdisasm", str(cubin)))


def code_of_library(library: Path) -> list[MachineCode]:
    """Reads the cubins that a shared library carries, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        _output("cuobjdump", "--extract-elf", "all", str(library.resolve()), folder=folder)
        return [disassembled(cubin) for cubin in sorted(Path(folder).glob("*.cubin"))]


def _output(name: str, *arguments: str, folder: str | None = None) -> str:
    program = tool(name)
    if program is None:
        raise FileNotFoundError(f"there is no {name}; pip install nvidia-cuda-{name}")
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def read(text: str) -> MachineCode:
    """Reads what nvdisasm printed of a cubin."""
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
    return [Loop(Counter(opcodes[begin:end])) for begin, end in innermost]
