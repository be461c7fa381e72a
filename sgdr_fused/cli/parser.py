"""The parser of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn, TypeAlias

from sgdr_fused.values import shown

__all__ = ["Commands", "Parser", "integer", "real", "with_dashes"]

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The commands of a parser, to which each command's module adds its own."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def refuse_unknown(self, argv: Sequence[str]) -> None:
        """Names an option that does not exist, and the nearest that does.

        argparse would only say which required option is missing.

        Args:
            argv: The arguments of a command.
        """
        known = [name for action in self._actions for name in action.option_strings]
        for name in (arg.partition("=")[0] for arg in argv):
            if not name.startswith("--") or any(other.startswith(name) for other in known):
                continue
            nearest = get_close_matches(name, known, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"see {self.prog} --help"
            self.error(f"there is no option {name}; {advice}")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """The arguments with ``--T_0`` spelt ``--T-0``."""
    spelt = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        spelt.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return spelt


def integer(text: str) -> int:
    """An option's value as an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not an integer") from error


def real(text: str) -> float:
    """An option's value as a number: an int if it is one, because integers are exact."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number") from error
