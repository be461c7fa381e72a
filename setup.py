"""Installs the package with its C++ sources, and builds the native backend where torch is found.

Without build isolation torch is found; else ``sgdr-fused build`` builds it afterwards.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# By its path: the package itself needs torch to be imported.
sys.path.insert(0, str(ROOT / "sgdr_fused" / "building"))
from recipe import say, setup_arguments  # noqa: E402


class BuildWithSources(build_py):
    """Puts ``csrc/`` into the package, for ``sgdr-fused build``."""

    def run(self) -> None:
        """Copies the package, and the sources; an editable install has them where they are."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "sgdr_fused" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


def native_backend() -> dict[str, Any]:
    """The arguments of setup() that build the extension; none where it is not to be built.

    The environment variable SGDR_FUSED_NATIVE=0 leaves it out, and =1 makes it an error that there
    is no torch to build for.
    """
    wanted = os.environ.get("SGDR_FUSED_NATIVE", "")
    if wanted != "0":
        try:
            return dict(setup_arguments(ROOT))
        except ImportError as error:
            if wanted == "1":
                raise
            say(f"no torch to build for ({error})")
    say("installing without the native backend; sgdr-fused build builds it afterwards")
    return {}


arguments = native_backend()
setup(cmdclass={"build_py": BuildWithSources, **arguments.pop("cmdclass", {})}, **arguments)
