"""Builds the shim and the fake CUDA runtime, and runs scripts on them, for tests without a GPU.

A script runs in a Python whose torch is a CUDA 13 build: this one, or the one that the environment
variable SGDR_CUDA_PYTHON names. All is built once into a cache folder, anew when a source changes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent.parent
CACHE = Path(tempfile.gettempdir()) / f"sgdr_cuda_on_cpu_{os.getuid()}"
CXX_FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}"]
CXX_FLAGS += [f"-I{REPOSITORY / 'csrc'}", "-ffp-contract=off", "-fno-extern-tls-init"]
CXX_FLAGS += ["-Wno-unknown-pragmas"]  # unroll; g++ 12 heeds only the flag
# Symbols stay in their library: see load_host_kernels() in fake_cudart.cpp.
LIBRARY_FLAGS = ["-shared", "-fPIC", "-fno-gnu-unique", "-Wl,-Bsymbolic"]


# ----------------------------------------------------------------------------------------- building


def _with_includes(source: Path, seen: set[Path]) -> set[Path]:
    """Adds a source and all that it includes by `#include "..."` to `seen`."""
    if source in seen:
        return seen
    seen.add(source)
    for name in re.findall(r'^#include "(.*)"', source.read_text(), re.M):
        for folder in (source.parent, FOLDER, REPOSITORY / "csrc"):
            if (folder / name).exists():
                _with_includes((folder / name).resolve(), seen)
                break
    return seen


def _build(name: str, command: Sequence[str], source: Path) -> Path:
    """Runs `command source -o ...`, unless it was already run on these sources."""
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted(_with_includes(source.resolve(), set())):
        digest.update(path.read_bytes())
    target = CACHE / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{name}.{os.getpid()}")
    command = [*command, str(source), "-o", str(unfinished)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{ran.stderr}", pytrace=False)
    unfinished.replace(target)
    return target


def _compiler() -> str:
    return shutil.which("g++") or pytest.skip("there is no g++")


def shim_program(source: Path, *, sanitize: str = "", flags: Sequence[str] = ()) -> Path:
    """Compiles a program that includes cuda_shim.h; `sanitize` is what -fsanitize= takes."""
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    command = [_compiler(), *CXX_FLAGS, *checks, *_torch_include(), *flags]
    return _build(source.stem, command, source)


def host_kernels(source: Path, *, flags: Sequence[str] = ()) -> Path:
    """Compiles a file with HOST_KERNEL(...) lines, see host_kernel.h, into a library."""
    command = [_compiler(), *CXX_FLAGS, *LIBRARY_FLAGS, *_torch_include(), *flags]
    return _build(f"lib{source.stem}.so", command, source)


def cuda_library(source: Path, *, flags: Sequence[str] = ()) -> Path:
    """Compiles a .cu file by nvcc into a library for ctypes, on the runtime that can be faked."""
    nvcc = shutil.which("nvcc") or pytest.skip("there is no nvcc")
    command = [nvcc, "-shared", "-std=c++20", "-arch=sm_80", "-Xcompiler=-fPIC", "-cudart=shared"]
    return _build(f"lib{source.stem}.so", [*command, *flags], source)


# ------------------------------------------------------------------------ the runtime and its torch


@functools.cache
def python() -> str:
    """The Python whose torch is run on the fake runtime."""
    return os.environ.get("SGDR_CUDA_PYTHON", sys.executable)


def _torch_include() -> list[str]:
    return ["-isystem", str(_torch_folder() / "include")]


@functools.cache
def _torch_folder() -> Path:
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    found = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True)
    if not found.stdout.strip():
        pytest.skip("torch is not installed")
    return Path(found.stdout.strip()).parent


def require_cuda_torch() -> None:
    """Skips the test unless torch is a build for CUDA 13."""
    version = re.search(r"^cuda.*= '(.*)'", (_torch_folder() / "version.py").read_text(), re.M)
    if version is None or not version[1].startswith("13."):
        built_for = f"CUDA {version[1]}" if version else "the CPU"
        pytest.skip(
            f"needs a torch built for CUDA 13, and this one is for {built_for}; "
            "SGDR_CUDA_PYTHON may name the Python of another"
        )


@functools.cache
def _cuda_headers() -> Path | None:
    """Where the CUDA runtime's headers are: nvcc's, or those of the packages beside torch."""
    folders = list(_torch_folder().parent.glob("nvidia/*/include"))
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        if top := re.search(r"TOP=(.*)", dry_run.stderr):
            folders.insert(0, Path(top[1]) / "include")
            folders.insert(0, Path(top[1]) / "targets/x86_64-linux/include")
    for folder in folders:
        if (folder / "cuda_runtime_api.h").exists() and (folder / "crt/host_defines.h").exists():
            return folder
    return None


@functools.cache
def _fake_cudart() -> Path:
    headers = _cuda_headers() or pytest.skip("the CUDA runtime's headers are not installed")
    command = [_compiler(), *CXX_FLAGS, *LIBRARY_FLAGS, "-isystem", str(headers)]
    return _build("libfake_cudart.so", command, FOLDER / "fake_cudart.cpp")


@functools.cache
def _fake_libcuda() -> Path:
    """The driver library that torch opens at start-up: every function it looks for is missing.

    But for those that ask for the current context, which there is one of.
    """
    context = "(void** context) { *context = (void*)0x40; return 0; }"
    working = {
        "cuInit": "(unsigned) { return 0; }",
        "cuCtxGetCurrent": context,
        "cuCtxSetCurrent": "(void*) { return 0; }",
        "cuDevicePrimaryCtxRetain": context,
        "cuDevicePrimaryCtxGetState": "(int, unsigned* flags, int* active)"
        " { *flags = 0; *active = 1; return 0; }",
    }
    library = _torch_folder() / "lib/libcaffe2_nvrtc.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    wanted = sorted(set(re.findall(r" (cu[A-Z]\w*)", symbols.stdout)))
    code = "".join(
        f'extern "C" int {name}{working.get(name, "() { return 801; }  // not supported")}\n'
        for name in wanted
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / f"libcuda.{os.getpid()}.cpp"
    source.write_text(code)
    library = _build("libcuda.so.1", [_compiler(), "-shared", "-fPIC"], source)
    source.unlink()
    return library


def run(
    script: str,
    *arguments: object,
    kernels: Sequence[Path] = (),
    devices: int = 1,
    guard: bool = False,
    deferred: bool = False,
    seed: int = 1,
    environment: dict[str, str] | None = None,
    under: Sequence[str] = (),
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Runs Python code on the fake runtime, with torch's own few kernels and `kernels` at hand.

    Args:
        script: the code; `import runtime_log` works in it.
        arguments: its sys.argv[1:].
        kernels: libraries from host_kernels().
        devices, guard, deferred: see the head of fake_cudart.cpp; `guard` guards each tensor.
        seed: the order of blocks and threads, see shim_scheduler.h.
        environment: further variables.
        under: a command that runs Python, such as valgrind with its options.
        timeout: in seconds.
    """
    require_cuda_torch()
    torch_kernels = host_kernels(FOLDER / "torch_kernels.cpp")
    variables = {
        **os.environ,
        "LD_PRELOAD": str(_fake_cudart()),
        "LD_LIBRARY_PATH": str(_fake_libcuda().parent),
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(REPOSITORY)]),
        "FAKE_CUDA_KERNELS": ":".join(map(str, [torch_kernels, *kernels])),
        "FAKE_CUDA_DEVICES": str(devices),
        "FAKE_CUDA_GUARD": str(int(guard)),
        "FAKE_CUDA_DEFERRED": str(int(deferred)),
        "SHIM_SEED": str(seed),
        **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if guard else {}),
        **(environment or {}),
    }
    return subprocess.run(
        [*under, python(), "-X", "faulthandler", "-c", script, *map(str, arguments)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def report(script: str, *arguments: object, **options: Any) -> dict[str, Any]:
    """Runs a script that must succeed; returns what it passed to runtime_log.report()."""
    ran = run(script, *arguments, **options)
    if ran.returncode != 0:
        pytest.fail(f"exit status {ran.returncode}\n{ran.stdout}{ran.stderr}", pytrace=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("REPORT ")]
    return {key: value for line in lines for key, value in json.loads(line[7:]).items()}
