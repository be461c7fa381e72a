"""Builds the native backend for this torch, Python and GPU into the cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sgdr_fused import native
from sgdr_fused.building import recipe
from sgdr_fused.building.recipe import CSRC, BuiltFor

__all__ = ["BuildError", "build", "gpus_at_hand"]


class BuildError(RuntimeError):
    """The native backend could not be built; the message says why, and where the log is."""


def build(report: Callable[[str], None], force: bool = False) -> Path:
    """Builds the native backend, if there is no build for this torch, Python and GPU yet.

    The environment variables of ``setup.py`` hold: ``TORCH_CUDA_ARCH_LIST``, ``SGDR_FUSED_CUDA``,
    ``CXX`` and others. Without ``TORCH_CUDA_ARCH_LIST`` the CUDA backend is for the GPUs at hand
    and those that it was built for before, or for all architectures where there is no GPU.

    Args:
        report: Called with each line about the progress.
        force: Build again what is there.

    Returns:
        The folder of the build, in :func:`sgdr_fused.native.cache`.

    Raises:
        BuildError: A compiler or the sources are missing, or compiling fails.
    """
    _check_tools()
    toolkit, _ = recipe.find_cuda(torch.version.cuda)
    architectures = "" if toolkit is None else _architectures(toolkit)
    here = BuiltFor.here(torch.__version__, architectures)
    kind = re.sub(r"[^\w.+]", "-", architectures) or "cpu"
    target = native.cache() / f"torch-{here.torch}_{here.python}_{here.sources}_{kind}"
    for folder in (native.folder, target):
        if folder is not None and BuiltFor.read(folder) == here and not force:
            report("already built")
            return folder
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own: another process may be building the same.
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as scratch:
        folder = Path(scratch)
        (folder / "lib" / "sgdr_fused").mkdir(parents=True)
        _compile(folder, Path(f"{target}.log"), architectures, report)
        shutil.rmtree(target, ignore_errors=True)
        (folder / "lib" / "sgdr_fused").rename(target)
    _check_that_it_loads()
    return target


def gpus_at_hand() -> list[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs, each once; none without CUDA in torch."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    gpus = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})


def _check_tools() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"there is no C++ compiler {compiler!r}; install one, such as g++, or set CXX"
        )
    if CSRC is None:
        raise BuildError(f"the C++ sources are missing from {recipe.PACKAGE}; install it again")


def _architectures(toolkit: Path) -> str:
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted
    gpus = gpus_at_hand()
    if not gpus:
        return recipe.all_architectures(toolkit)
    known = {f"{major}.{minor}" for major, minor in gpus}
    for folder in native.builds_here():
        if before := BuiltFor.read(folder):
            known |= set(re.findall(r"\d+\.\d+", before.cuda_architectures))
    # Later GPUs compile the PTX of the last.
    return ";".join(sorted(known, key=float)) + "+PTX"


def _compile(folder: Path, log: Path, architectures: str, report: Callable[[str], None]) -> None:
    assert CSRC is not None
    script = recipe.__file__
    command = [sys.executable, script, "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "objects")]
    environment = os.environ | ({"TORCH_CUDA_ARCH_LIST": architectures} if architectures else {})
    begin = time.monotonic()
    with (
        log.open("w") as lines,
        subprocess.Popen(
            command,
            cwd=CSRC,  # where setuptools sees no pyproject.toml
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as compiling,
    ):
        assert compiling.stdout is not None
        for line in compiling.stdout:
            lines.write(line)
            if said := _progress(line):
                report(f"{said} ({time.monotonic() - begin:.0f} s)")
    if compiling.returncode != 0:
        raise BuildError(f"compiling failed: {_last_error(log)}; all of it is in {log}")


def _progress(line: str) -> str:
    """What a line of the build says to the user; empty: nothing."""
    if line.startswith("sgdr_fused: "):
        return line.removeprefix("sgdr_fused: ").strip()
    source = re.search(r" -c (\S+\.(?:cpp|cu)) ", line)
    if source is None:
        return ""
    count = re.match(r"\[\d+/\d+\]", line)
    path = Path(source[1])
    return f"{count[0] if count else 'compiling'} {path.parent.name}/{path.name}"


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    # What the compiler says, rather than what its callers say about that.
    for pattern in (r"(?<!\w)(fatal )?error: ", r"Error: ", r"rror"):
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            return found[-1]
    return lines[-1] if lines else "it said nothing"


def _check_that_it_loads() -> None:
    code = "from sgdr_fused import native; print(native.why_missing, end='')"
    path = os.pathsep.join([str(recipe.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
    )
    if said.returncode != 0 or said.stdout:
        raise BuildError(f"it is built, but: {said.stdout or said.stderr.strip()}")
