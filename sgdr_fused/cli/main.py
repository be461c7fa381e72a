"""The command line; ``sgdr-fused --help``. Each command is a module with ``add_to()``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sgdr_fused.cli import build, doctor, fit, schedule
from sgdr_fused.cli.parser import Commands, Parser, with_dashes
from sgdr_fused.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Its arguments; None: those of the process.
    """
    parser, commands = _make_parser()
    argv = with_dashes(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in commands.choices:
        commands.choices[argv[0]].refuse_unknown(argv[1:])
    args = parser.parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe; Python would raise again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def _make_parser() -> tuple[Parser, Commands]:
    parser = Parser(
        prog="sgdr-fused",
        description="Builds and checks the native backend; looks at a schedule before training.",
    )
    parser.add_argument("--version", action="version", version=f"sgdr_fused {__version__}")
    commands = parser.add_subparsers(required=True)
    for command in (build, doctor, schedule, fit):
        command.add_to(commands)
    commands.metavar = " | ".join(commands.choices)
    return parser, commands
