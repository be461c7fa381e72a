"""Which name a misspelt one stands for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["nearest_name"]


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that another looks like a misspelling of; None if there is none.

    Case and ``_`` or ``-`` do not count. The first letter does, because a prefix as in
    ``no_weight_decay`` makes another name.

    Args:
        name: What was written.
        names: What could have been meant.
    """
    by_letters = {
        _letters(known): known for known in names if _letters(known)[0] == _letters(name)[:1]
    }
    found = get_close_matches(_letters(name), by_letters, n=1, cutoff=0.85)
    return by_letters[found[0]] if found else None


def _letters(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")
