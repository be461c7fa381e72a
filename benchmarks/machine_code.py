"""The machine code of the CUDA kernels; needs no GPU.

python -m benchmarks.machine_code prints registers, instructions an element and bytes an element for
each kernel and architecture, and the number of accesses whose address ptxas may get wrong. It needs
nvcc, and nvdisasm from PATH or from the package nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.disassembly import Loop, MachineCode, disassembled, tool
from sgdr_fused.building import recipe

__all__ = ["Kernel", "architectures", "compiled", "compiled_source", "missing_tool", "row_of"]

REPOSITORY = Path(__file__).parent.parent
RESULT = REPOSITORY / "benchmarks/results/machine_code.json"
CACHE = Path(tempfile.gettempdir()) / f"sgdr_machine_code_{os.getuid()}"

# Elements in a pack of 16 bytes, two of which a thread updates at once.
WIDTHS = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}
PACKS_IN_FLIGHT = 2

# The flags that torch.utils.cpp_extension adds and that change the code.
TORCH_FLAGS = ("--expt-relaxed-constexpr",)


def _source(name: str, args: str) -> str:
    """A source with one kernel."""
    kernel = f"__global__ void sgdr::{name}_kernel<{args}>(const __grid_constant__ {args});"
    return f'#include "cuda/{name}.cuh"\ntemplate {kernel}\n'


def _step(extras: str) -> str:
    return _source("fused_step", f"sgdr::LaunchArgs<sgdr::Extras::{extras}, sgdr::kLargePayload>")


# A source for each kernel, with the most arguments.
SOURCES = {
    "step": _step("kNone"),
    "step with averages": _step("kAverages"),
    "step with rounding": _step("kRounding"),
    "step with master weights": _step("kMasters"),
    "step with all of these": _step("kAll"),
    "norm": _source("grad_norm", "sgdr::FilledNormLaunch"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, and ptxas' report on it."""

    code: MachineCode
    registers: int
    spilled_bytes: int
    stack_bytes: int

    @property
    def architecture(self) -> str:
        """Such as "80"."""
        return self.code.architecture


def missing_tool() -> str:
    """What is missing to run this; empty if nothing."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if tool("nvdisasm") is None:
        return "there is no nvdisasm; pip install nvidia-cuda-nvdisasm"
    return ""


def architectures() -> list[str]:
    """The architectures that the package is built for, such as "80"."""
    return [name.replace(".", "") for name in recipe.CUDA_ARCHITECTURES]


def compiled(names: Sequence[str], kernel: str = "step") -> list[Kernel]:
    """A kernel's machine code, compiled with the package's flags.

    Args:
        names: Architectures, such as "80".
        kernel: A key of ``SOURCES``.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda name: compiled_source(name, SOURCES[kernel]), names))


def compiled_source(architecture: str, text: str) -> Kernel:
    """The machine code of one kernel's source, compiled with the package's flags.

    Args:
        architecture: Such as "80".
        text: CUDA C++, which may include files from csrc/ and from torch.
    """
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    include = Path(torch.origin).parent / "include"
    flags = [*recipe.NVCC_FLAGS, *TORCH_FLAGS, f"-arch=sm_{architecture}"]
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
    said = report.read_text()

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, said))

    return Kernel(
        code=disassembled(cubin),
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spilled_bytes=total(r"(\d+) bytes spill"),
        stack_bytes=total(r"(\d+) bytes stack frame"),
    )


def instructions_per_element(loop: Loop, dtype: str) -> float:
    """Instructions of a loop, but for the two products that grad_scale and clipping add."""
    elements = PACKS_IN_FLIGHT * WIDTHS[dtype]
    return (loop.size - 2 * elements) / elements


def bytes_per_element(loop: Loop, dtype: str) -> float:
    """Bytes that a loop reads and writes."""
    return loop.vector_accesses * 16 / (PACKS_IN_FLIGHT * WIDTHS[dtype])


def row_of(name: str, kernel: Kernel) -> dict[str, Any]:
    """A kernel's row in the results."""
    return {
        "kernel": name,
        "architecture": f"sm_{kernel.architecture}",
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled_bytes,
        "constant_bytes": kernel.code.constant_bytes,
        "faults": {fault: len(found) for fault, found in kernel.code.faults.items()},
    }


def main() -> None:
    """Prints the tables and writes them as JSON."""
    if missing := missing_tool():
        raise SystemExit(missing)
    kernels = {name: compiled(architectures(), name) for name in SOURCES}
    rows = [row_of(name, kernel) for name, of_name in kernels.items() for kernel in of_name]
    print("Arguments end: the byte of the constant bank where a kernel's arguments end.")
    print("Faults: accesses to local memory, and accesses that ptxas may have got wrong.")
    print(f"{'':34}{'registers':>10}{'spilled':>9}{'arguments end':>15}{'faults':>8}")
    for row in rows:
        print(
            f"{row['kernel']:26}{row['architecture']:8}{row['registers']:>10}"
            f"{row['spilled_bytes']:>9}{row['constant_bytes']:>#15x}{sum(row['faults'].values()):>8}"
        )

    print("\nInstructions / bytes an element, with weight decay and Nesterov, without grad_scale:")
    print(f"{'':26}" + "".join(f"{name:>14}" for name in (*WIDTHS, "rounded bf16")))
    by_name = {(row["kernel"], row["architecture"]): row for row in rows}
    for plain, rounding in zip(kernels["step"], kernels["step with rounding"], strict=True):
        row = by_name["step", f"sm_{plain.architecture}"]
        cells = []
        for dtype in WIDTHS:
            count = instructions_per_element(plain.code.usual_loop(dtype), dtype)
            n_bytes = bytes_per_element(plain.code.usual_loop(dtype), dtype)
            row[f"{dtype}_instructions_per_element"] = count
            row[f"{dtype}_bytes_per_element"] = n_bytes
            cells.append(f"{count:.2f} / {n_bytes:.0f}")
        loop = rounding.code.usual_loop("bfloat16", rounded=2)
        count = instructions_per_element(loop, "bfloat16")
        by_name["step with rounding", row["architecture"]]["bfloat16_instructions_per_element"] = (
            count
        )
        cells.append(f"{count:.2f}")
        print(f"{row['architecture']:26}" + "".join(f"{cell:>14}" for cell in cells))
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
