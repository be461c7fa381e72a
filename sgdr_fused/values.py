"""Plain Python values for what users pass: NumPy's numbers and tensors of one element, too.

A checkpoint with a NumPy number in it does not load with ``weights_only=True``, and the native step
reads Python's own numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

__all__ = [
    "AT_LEAST_0",
    "FINITE",
    "FLAG",
    "INTEGER",
    "LENGTH",
    "LONGEST",
    "STEP",
    "Range",
    "choice",
    "floats",
    "integers",
    "or_none",
    "shown",
]

LONGEST = 2**53
"""The longest cycle or warm-up, in steps: up to here every integer is an exact double."""


class Range(NamedTuple):
    """The values that an argument may have.

    Attributes:
        convert: Turns what a user may pass into a plain Python value; raises if it cannot.
        contains: Whether a plain value is in the range.
        words: The range, to follow "must be" in a message.
    """

    convert: Callable[[Any], Any]
    contains: Callable[[Any], bool]
    words: str

    def plain(self, name: str, value: object) -> Any:
        """The value as a plain Python one; the same object if it is one already.

        Args:
            name: The argument's name.
            value: What a user has passed.

        Raises:
            ValueError: It is not in the range; the message names argument, value and range.
        """
        cause = None
        try:
            plain = self.convert(value)
            if self.contains(plain):
                return plain
        except Exception as error:
            cause = error
        label = "learning rate" if name == "lr" else f"{name} value"  # as torch.optim.SGD says
        raise ValueError(f"Invalid {label}: {shown(value)}; {name} must be {self.words}") from cause


def floats(words: str, contains: Callable[[float], bool]) -> Range:
    """A range of floats; integers count, bools do not."""
    return Range(_to_float, contains, words)


def integers(least: int, most: int, words: str) -> Range:
    """A range of integers, both ends included. A float or bool is none, also 10.0 and True."""
    return Range(_to_int, lambda value: least <= value <= most, words)


def or_none(some: Range) -> Range:
    """A range that also contains None."""
    return Range(
        lambda value: None if value is None else some.convert(value),
        lambda value: value is None or some.contains(value),
        f"None or {some.words}",
    )


def choice(*strings: str) -> Range:
    """A range of a few strings."""
    return Range(
        lambda value: strings[strings.index(_unboxed(value))],
        lambda _: True,
        f"one of {strings}",
    )


def shown(value: object) -> str:
    """A value for a message: its repr in one line, shortened; never raises."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # also an int of more digits than Python prints
        text = object.__repr__(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"


def _unboxed(value: Any) -> Any:
    """The number in a NumPy scalar, or in an array or tensor of one element; else the value."""
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _to_float(value: Any) -> float:
    if type(value) is float:
        return value
    number = _unboxed(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{type(value).__name__} is no real number")
    return float(number)


def _to_int(value: Any) -> int:
    if type(value) is int:
        return value
    number = _unboxed(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{type(value).__name__} is no integer")
    return int(number)


def _to_flag(value: Any) -> bool:
    flag = _unboxed(value)
    if type(flag) not in (bool, int) or flag not in (0, 1):
        raise TypeError(f"{type(value).__name__} is no bool")
    return bool(flag)


FLAG = Range(_to_flag, lambda _: True, "True or False")

FINITE = floats("a finite float", math.isfinite)
AT_LEAST_0 = floats("a finite float >= 0", lambda value: 0 <= value < math.inf)
INTEGER = Range(_to_int, lambda _: True, "an integer")
LENGTH = integers(1, LONGEST, "an integer from 1 to 2**53")
# Counts are int64 in C++; these leave room to go on counting.
STEP = integers(0, 2**61, "an integer from 0 to 2**61")
