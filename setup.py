"""Installs the package with its C++ sources, and builds the native backend where torch is found.

Without build isolation torch is found; else ``sgdr-fused build`` builds it afterwards.
"""

from __future__ import annotations

import os
import re
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


def readme_for_index() -> str:
    """README.md with absolute links: on a package index those relative to the tree are dead."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    repository = re.findall(r'^Repository = "(.+)"$', project, re.M)[0]

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        if path.startswith("#"):
            return f"[{text}]({repository}{path})"
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)", absolute, readme)


arguments = native_backend()
setup(
    cmdclass={"build_py": BuildWithSources, **arguments.pop("cmdclass", {})},
    long_description=readme_for_index(),
    long_description_content_type="text/markdown",
    **arguments,
)
