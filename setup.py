"""Builds the native backend where torch and a compiler are found; the reference path needs
neither."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).parent / "sgdr_fused"

SOURCES = ["csrc/bindings.cpp", "csrc/stepper.cpp", "csrc/cpu/fused_step.cpp"]

# No fused multiply-add but those written out, see Note [Same bits everywhere] in csrc/sgdr_math.h.
# What the other two give up (errno, floating-point traps) nobody reads, and the vectoriser needs
# it given up.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
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


def say(message: str) -> None:
    """Prints one line that survives pip's filtering in verbose mode."""
    print(f"sgdr_fused: {message}", file=sys.stderr)


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
        from torch.utils.cpp_extension import BuildExtension, CppExtension
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
                )
                self.extensions = []
                return
            folder = PACKAGE if self.inplace else Path(self.build_lib) / "sgdr_fused"
            (folder / "_built_for.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    say(f"building the CPU backend for torch {torch.__version__}")
    flags = CXX_FLAGS + (["-Werror"] if os.environ.get("SGDR_FUSED_WERROR") == "1" else [])
    extension = CppExtension("sgdr_fused._native", SOURCES, extra_compile_args={"cxx": flags})
    # Their warnings are not ours.
    extension.extra_compile_args["cxx"] += [f"-isystem{path}" for path in extension.include_dirs]
    extension.include_dirs = []
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


setup(**native_backend())
