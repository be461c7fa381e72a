"""Which name a misspelt one stands for."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["nearest_name"]


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that another looks like a misspelling of; None if there is none.

    They differ in case, in ``_`` and ``-``, and in a letter of four, two at most; not in the
    first one, because a prefix as in ``no_weight_decay`` makes another name.

    Args:
        name: What was written.
        names: What could have been meant.
    """
    written, nearest, least = _letters(name), None, 3
    for known in names:
        letters = _letters(known)
        distance = _distance(written, letters)
        if written[:1] == letters[:1] and distance <= len(letters) // 4 and distance < least:
            nearest, least = known, distance
    return nearest


def _letters(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")


def _distance(one: str, other: str) -> int:
    """Letters to insert, delete or replace, by Levenshtein's recurrence."""
    above = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, other_letter in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other_letter)))
        above = row
    return above[-1]
