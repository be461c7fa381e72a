"""Builds the native backend where torch and a compiler are found; the reference path needs
neither."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).parent / "sgdr_fused"

SOURCES = [
    "csrc/cpu/fused_step.cpp",
    "csrc/cpu/grad_norm.cpp",
    "csrc/torch/flattener.cpp",
    "csrc/torch/op.cpp",
    "csrc/python/bindings.cpp",
    "csrc/python/gatherer.cpp",
    "csrc/python/grad_norm.cpp",
    "csrc/python/group_on_gpu.cpp",
    "csrc/python/param_group.cpp",
    "csrc/python/new_state.cpp",
    "csrc/python/stepper.cpp",
]
CUDA_SOURCES = ["csrc/cuda/fused_step.cu", "csrc/cuda/grad_norm.cu"]

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
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-lineinfo"]
NVCC_HOST_FLAGS = ["-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]

# Turing to Blackwell.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def say(message: str) -> None:
    """Prints one line that survives pip's filtering in verbose mode."""
    print(f"sgdr_fused: {message}", file=sys.stderr)


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


def cuda_architectures(toolkit: Path) -> str:
    """Those that the toolkit knows, in torch's notation; what comes later compiles the PTX."""
    nvcc = str(toolkit / "bin" / "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    names = [f"compute_{a.replace('.', '')}" for a in CUDA_ARCHITECTURES]
    pairs = zip(CUDA_ARCHITECTURES, names, strict=True)
    return ";".join(a for a, name in pairs if name in known.stdout.split()) + "+PTX"


def sanitizer_flags() -> list[str]:
    """The compiler's flags for SGDR_FUSED_SANITIZE=address or =thread; none if it is not set."""
    name = os.environ.get("SGDR_FUSED_SANITIZE")
    if not name:
        return []
    return [*SANITIZER_FLAGS[name], "-O1", "-g1", "-fno-omit-frame-pointer"]


def native_backend() -> dict[str, object]:
    """The arguments of setup() that build the extension; none where it is not to be built.

    The environment variable SGDR_FUSED_NATIVE=0 leaves it out, and =1 makes any failure to build
    it an error.
    """
    wanted = os.environ.get("SGDR_FUSED_NATIVE", "")
    if wanted == "0":
        say("SGDR_FUSED_NATIVE=0: installing the reference path only")
        return {}
    try:
        import torch

        toolkit, why = find_cuda(torch.version.cuda)
        if toolkit is not None:
            # Read when torch.utils.cpp_extension is imported.
            os.environ["CUDA_HOME"] = str(toolkit)
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if wanted == "1":
            raise
        say(
            f"no torch to build for ({error}): installing the reference path only. "
            "Install torch first, then "
            "pip install --no-build-isolation ."
        )
        return {}

    class BuildNative(BuildExtension):  # type: ignore[misc]
        """Builds the extension and notes what for; a failure leaves the reference path."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wanted == "1":
                    raise
                say(
                    f"the native backend could not be built ({error}): installing the "
                    "reference path only"
                    + ("; try SGDR_FUSED_CUDA=0" if toolkit is not None else "")
                )
                self.extensions = []
                return
            folder = PACKAGE if self.inplace else Path(self.build_lib) / "sgdr_fused"
            (folder / "_built_for.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    werror = os.environ.get("SGDR_FUSED_WERROR") == "1"
    flags = {"cxx": CXX_FLAGS + sanitizer_flags() + (["-Werror"] if werror else [])}
    if toolkit is None:
        say(f"building the CPU backend for torch {torch.__version__}; no CUDA backend: {why}")
        extension = CppExtension("sgdr_fused._native", SOURCES, extra_compile_args=flags)
    else:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(toolkit)
        say(
            f"building the CPU and CUDA backends for torch {torch.__version__}: {why}; "
            f"for compute capability {os.environ['TORCH_CUDA_ARCH_LIST']}"
        )
        host_flags = NVCC_HOST_FLAGS + (["-Werror"] if werror else [])
        flags["nvcc"] = NVCC_FLAGS + [f"-Xcompiler={flag}" for flag in host_flags]
        flags = {compiler: [*of_it, "-DSGDR_WITH_CUDA"] for compiler, of_it in flags.items()}
        extension = CUDAExtension(
            "sgdr_fused._native", SOURCES + CUDA_SOURCES, extra_compile_args=flags
        )
    # Their warnings are not ours.
    for of_compiler in flags.values():
        for path in extension.include_dirs:
            of_compiler += ["-isystem", path]
    extension.include_dirs = []
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


setup(**native_backend())
