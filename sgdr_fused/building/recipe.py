"""How the native backend is compiled, and what is noted about the result.

``setup.py`` loads this file by its path, and ``sgdr-fused build`` runs it as a script: it imports
nothing of the package, and torch only where it builds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of the package."""

# Beside the package in a source tree, within it where it is installed.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), None)
"""The C++ and CUDA sources; None if they are not there."""

SOURCES = ("cpu/fused_step.cpp", "cpu/grad_norm.cpp", "torch/all.cpp", "python/all.cpp")
CUDA_SOURCES = ("cuda/fused_step.cu", "cuda/grad_norm.cu")

# No fused multiply-add but those written out, see Note [Same bits everywhere] in csrc/sgdr_math.h.
# What the other two give up (errno, floating-point traps) nobody reads, and the vectoriser needs
# it given up.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python asks for -g, which takes as long again
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    # For at::parallel_for, which is a plain loop without it. Not for the linker: the runtime is
    # torch's own.
    "-fopenmp",
    "-Wall",
    "-Wextra",
]
# By the value of SGDR_FUSED_SANITIZE. A line number says where; -O1 keeps the build short.
SANITIZER_FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# Several architectures are compiled side by side.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-lineinfo", "--threads=4"]
NVCC_HOST_FLAGS = ["-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]

# Turing to Blackwell.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


@dataclass(frozen=True)
class BuiltFor:
    """What a build fits; kept in a JSON file beside it.

    Attributes:
        torch: ``torch.__version__``.
        python: Python's tag, such as ``"cpython-311"``.
        sources: :func:`digest` of the sources.
        cuda_architectures: In torch's notation, such as ``"8.0;9.0+PTX"``; empty: no CUDA backend.
    """

    torch: str
    python: str
    sources: str
    cuda_architectures: str

    FILE = "_native.json"

    @classmethod
    def here(cls, torch: str, cuda_architectures: str = "") -> BuiltFor:
        """What a build made now, by this Python, fits."""
        return cls(torch, str(sys.implementation.cache_tag), digest(), cuda_architectures)

    @classmethod
    def read(cls, folder: Path) -> BuiltFor | None:
        """What the build in a folder fits; None if there is none."""
        try:
            return cls(**json.loads((folder / cls.FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Notes it beside the build."""
        (folder / self.FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def digest() -> str:
    """Stands for the content of all sources; empty without sources."""
    if CSRC is None:
        return ""
    content = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.is_file():
            content.update(f"{path.relative_to(CSRC)}\0".encode() + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def say(message: str) -> None:
    """Prints one line that survives pip's filtering in verbose mode."""
    print(f"sgdr_fused: {message}", file=sys.stderr, flush=True)


def find_cuda(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The CUDA toolkit to build the CUDA backend with; None and the reason where it is not built.

    Whether this machine has a GPU plays no part. The environment variable SGDR_FUSED_CUDA=0 leaves
    the CUDA backend out, and =1 makes it an error that it cannot be built.

    Args:
        torch_cuda: The CUDA version that torch was built for; None: no CUDA.
    """
    wanted = os.environ.get("SGDR_FUSED_CUDA", "")
    if wanted == "0":
        return None, "SGDR_FUSED_CUDA=0"
    toolkit, why = _find_toolkit(torch_cuda)
    if toolkit is None and wanted == "1":
        raise RuntimeError(f"SGDR_FUSED_CUDA=1, but {why}")
    return toolkit, why


def _find_toolkit(torch_cuda: str | None) -> tuple[Path | None, str]:
    if torch_cuda is None:
        return None, "this torch is built without CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return None, "there is no nvcc (set CUDA_HOME, or PATH)"
    # Its own word for where it lives: the one on PATH may be a link or a script.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    top = re.search(r"TOP=(.*)", dry_run.stderr)
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if top is None or release is None:
        return None, f"{nvcc} does not run"
    if release[1] != torch_cuda.partition(".")[0]:
        return None, f"nvcc is of CUDA {release[1]}.{release[2]}, but torch of CUDA {torch_cuda}"
    return Path(top[1]).resolve(), f"torch and nvcc are of CUDA {release[1]}"


def all_architectures(toolkit: Path) -> str:
    """Those that the toolkit knows, in torch's notation; what comes later compiles the PTX."""
    nvcc = str(toolkit / "bin" / "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    names = [f"compute_{a.replace('.', '')}" for a in CUDA_ARCHITECTURES]
    pairs = zip(CUDA_ARCHITECTURES, names, strict=True)
    return ";".join(a for a, name in pairs if name in known.stdout.split()) + "+PTX"


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of that compute capability.

    Machine code runs on the same major version from its minor version on, PTX on all later ones.

    Args:
        architectures: In torch's notation, such as ``"8.0;9.0+PTX"``.
        capability: As torch.cuda.get_device_capability() returns it.
    """
    for architecture in architectures.replace(" ", ";").split(";"):
        found = re.match(r"(\d+)\.(\d+)[af]?(\+PTX)?$", architecture)
        if found is not None:
            built = (int(found[1]), int(found[2]))
            if built <= capability and (found[3] or built[0] == capability[0]):
                return True
    return False


def sanitizer_flags() -> list[str]:
    """The compiler's flags for SGDR_FUSED_SANITIZE=address or =thread; none if it is not set."""
    name = os.environ.get("SGDR_FUSED_SANITIZE")
    if not name:
        return []
    return [*SANITIZER_FLAGS[name], "-O1", "-g1", "-fno-omit-frame-pointer"]


def setup_arguments(root: Path) -> Mapping[str, Any]:
    """The arguments of setup() that build the extension for the torch of this Python.

    Args:
        root: The folder that paths are relative to; setuptools wants relative ones.
    """
    # A virtual environment's ninja is beside its Python, and on PATH only where it is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    import torch

    toolkit, why = find_cuda(torch.version.cuda)
    if toolkit is not None:
        # Read when torch.utils.cpp_extension is imported.
        os.environ["CUDA_HOME"] = str(toolkit)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    architectures = ""
    if toolkit is not None:
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or all_architectures(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures

    class BuildNative(BuildExtension):
        """Builds the extension and notes what for."""

        def run(self) -> None:
            super().run()
            folder = PACKAGE if self.inplace else Path(self.build_lib) / "sgdr_fused"
            BuiltFor.here(torch.__version__, architectures).write(folder)

    if CSRC is None:
        raise RuntimeError(f"the C++ sources are missing from {PACKAGE}; install sgdr_fused again")
    folder = os.path.relpath(CSRC, root)
    sources = [f"{folder}/{name}" for name in SOURCES]
    werror = os.environ.get("SGDR_FUSED_WERROR") == "1"
    flags = {"cxx": CXX_FLAGS + sanitizer_flags() + (["-Werror"] if werror else [])}
    if toolkit is None:
        say(f"building the CPU backend for torch {torch.__version__}; no CUDA backend: {why}")
        make: Any = CppExtension
    else:
        say(
            f"building the CPU and CUDA backends for torch {torch.__version__}: {why}; "
            f"for compute capability {architectures}"
        )
        host_flags = NVCC_HOST_FLAGS + (["-Werror"] if werror else [])
        flags["nvcc"] = NVCC_FLAGS + [f"-Xcompiler={flag}" for flag in host_flags]
        flags = {compiler: [*of_it, "-DSGDR_WITH_CUDA"] for compiler, of_it in flags.items()}
        sources += [f"{folder}/{name}" for name in CUDA_SOURCES]
        make = CUDAExtension
    extension = make("sgdr_fused._native", sources, extra_compile_args=flags)
    # Their warnings are not ours.
    for of_compiler in flags.values():
        for path in extension.include_dirs:
            of_compiler += ["-isystem", path]
    extension.include_dirs = []
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


if __name__ == "__main__":
    from setuptools import setup  # type: ignore[import-untyped]

    setup(name="sgdr_fused", script_args=sys.argv[1:], **setup_arguments(Path.cwd()))
