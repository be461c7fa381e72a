"""``sgdr-fused build``: compiles the native backend."""

from __future__ import annotations

import argparse

from sgdr_fused.building.build import BuildError, build
from sgdr_fused.building.recipe import say
from sgdr_fused.cli.parser import Commands

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "build",
        help="compile the native backend for the torch, Python and GPU at hand",
        description="Compiles the native backend for the torch, Python and GPU at hand, into a "
        "cache folder ($SGDR_FUSED_CACHE, or ~/.cache/sgdr_fused), where import finds it. Needs a "
        "C++ compiler; for the GPU also an nvcc of torch's CUDA version. To be repeated after "
        "an upgrade of torch.",
    )
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    parser.set_defaults(command=_build)


def _build(args: argparse.Namespace) -> None:
    try:
        folder = build(say, args.force)
    except BuildError as error:
        raise SystemExit(f"sgdr-fused: error: {error}") from None
    say(f"the native backend is in {folder}")
