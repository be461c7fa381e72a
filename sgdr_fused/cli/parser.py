"""The parser of the command line."""

from __future__ import annotations

import argparse
from typing import NoReturn, TypeAlias

__all__ = ["Commands", "Parser", "real"]

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The commands of a parser, to which each command's module adds its own."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def real(text: str) -> float:
    """An int if the text is one, because integers are exact; else a float."""
    try:
        return int(text)
    except ValueError:
        return float(text)
