"""What nvcc makes of the CUDA kernels, on a machine without a GPU.

python -m benchmarks.machine_code prints registers, instructions an element and bytes an element for
each kernel and architecture. Needs nvcc, and nvdisasm, from PATH or the package
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Kernel", "Loop", "architectures", "compiled", "missing_tool"]

REPOSITORY = Path(__file__).parent.parent
RESULT = REPOSITORY / "benchmarks/results/machine_code.json"
CACHE = Path(tempfile.gettempdir()) / f"sgdr_machine_code_{os.getuid()}"

# What torch.utils.cpp_extension adds, as far as it changes the code.
TORCH_FLAGS = ("--expt-relaxed-constexpr",)

# A source for each kernel. The step has two: without and with what LaunchExtras are for.
_STEP = "__global__ void sgdr::fused_step_kernel<{}>(const __grid_constant__ sgdr::LaunchArgs);"
SOURCES = {
    "step": f'#include "cuda/fused_step.cuh"\ntemplate {_STEP.format("false")}\n',
    "step with extras": f'#include "cuda/fused_step.cuh"\ntemplate {_STEP.format("true")}\n',
    "norm": '#include "cuda/grad_norm.cuh"\n',
}

CONVERSIONS = ("HADD2", "F2F", "PRMT", "SHF", "SHL", "IMAD.U32", "IMAD.SHL")
DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")


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
        """Of the parameter: "half" stands for all that is converted."""
        if self.count("DFMA"):
            return "float64"
        return "half" if self.count(*CONVERSIONS) else "float32"


@dataclass(frozen=True)
class Kernel:
    """The kernel's machine code for one architecture."""

    architecture: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    local_accesses: int
    loops: Sequence[Loop]

    def usual_loop(self, dtype: str) -> Loop:
        """Of weight decay and Nesterov momentum, without grad_scale or clipping.

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


def missing_tool() -> str:
    """What is missing to run this; empty if nothing is."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if _nvdisasm() is None:
        return "there is no nvdisasm; pip install nvidia-cuda-nvdisasm"
    return ""


def architectures() -> list[str]:
    """The ones that setup.py builds for, such as "80"."""
    return [name.replace(".", "") for name in _constant_of_setup("CUDA_ARCHITECTURES")]


def compiled(names: Sequence[str], kernel: str = "step") -> list[Kernel]:
    """A kernel's machine code, compiled by setup.py's flags.

    Args:
        names: Architectures, such as "80".
        kernel: A key of ``SOURCES``.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda name: _compile(name, SOURCES[kernel]), names))


def _nvdisasm() -> str | None:
    packages = Path(sysconfig.get_path("purelib"))
    found = [*packages.glob("nvidia/*/bin/nvdisasm")]
    return str(found[0]) if found else shutil.which("nvdisasm")


def _constant_of_setup(name: str) -> list[str]:
    for statement in ast.parse((REPOSITORY / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return list(ast.literal_eval(statement.value))
    raise LookupError(f"setup.py has no {name}")


def _compile(architecture: str, text: str) -> Kernel:
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    include = Path(torch.origin).parent / "include"
    flags = [*_constant_of_setup("NVCC_FLAGS"), *TORCH_FLAGS, f"-arch=sm_{architecture}"]
    command = ["nvcc", *flags, "-Xptxas=-v", "-cubin", f"-I{REPOSITORY / 'csrc'}", f"-I{include}"]
    digest = hashlib.sha256("\0".join([*command, text]).encode())
    for path in sorted(
        [*(REPOSITORY / "csrc").rglob("*.h"), *(REPOSITORY / "csrc").rglob("*.cuh")]
    ):
        digest.update(path.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    cubin, report = folder / "kernel.cubin", folder / "report"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "kernel.cu"
        source.write_text(text)
        ran = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=True
        )
        report.write_text(ran.stderr)
    disassembler = _nvdisasm()
    assert disassembler is not None
    code = subprocess.run(
        [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    return _read(architecture, report.read_text(), code.stdout)


def _read(architecture: str, report: str, code: str) -> Kernel:
    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, report))

    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in instructions]
    spans = []
    for end, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        if target and labels[target[1]] <= end:
            spans.append((labels[target[1]], end + 1))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    return Kernel(
        architecture=architecture,
        registers=max(map(int, re.findall(r"Used (\d+) registers", report))),
        spilled_bytes=total(r"(\d+) bytes spill"),
        stack_bytes=total(r"(\d+) bytes stack frame"),
        local_accesses=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        loops=[Loop(Counter(opcodes[begin:end])) for begin, end in innermost],
    )


def main() -> None:
    """Prints the table and writes it as JSON."""
    if missing := missing_tool():
        raise SystemExit(missing)
    widths = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}
    rows: list[dict[str, object]] = []
    for kernel in compiled(architectures()):
        row: dict[str, object] = {
            "kernel": "step",
            "architecture": f"sm_{kernel.architecture}",
            "registers": kernel.registers,
            "spilled_bytes": kernel.spilled_bytes,
            "local_accesses": kernel.local_accesses,
        }
        for dtype, width in widths.items():
            loop = kernel.usual_loop(dtype)
            row[f"{dtype}_instructions_per_element"] = loop.size / width
            row[f"{dtype}_bytes_per_element"] = loop.vector_accesses * 16 / width
        rows.append(row)
    print("Vector loops of weight decay and Nesterov momentum: instructions / bytes an element")
    print(f"{'':8}{'registers':>10}{'spilled':>9}" + "".join(f"{d:>14}" for d in widths))
    for row in rows:
        figures = (
            f"{row[f'{d}_instructions_per_element']:.2f} / {row[f'{d}_bytes_per_element']:.0f}"
            for d in widths
        )
        print(
            f"{row['architecture']:8}{row['registers']:>10}{row['spilled_bytes']:>9}"
            + "".join(f"{figure:>14}" for figure in figures)
        )
    print(f"\n{'':26}{'registers':>10}{'spilled':>9}{'local accesses':>16}")
    for name in list(SOURCES)[1:]:
        for kernel in compiled(architectures(), name):
            rows.append(
                {
                    "kernel": name,
                    "architecture": f"sm_{kernel.architecture}",
                    "registers": kernel.registers,
                    "spilled_bytes": kernel.spilled_bytes,
                    "local_accesses": kernel.local_accesses,
                }
            )
            print(
                f"{name:18}{'sm_' + kernel.architecture:8}{kernel.registers:>10}"
                f"{kernel.spilled_bytes:>9}{kernel.local_accesses:>16}"
            )
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
