"""README.md as a package index shows it, where links relative to the repository lead nowhere."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


def for_index(readme: str, urls: Mapping[str, str]) -> str:
    """Makes the links to files absolute.

    Args:
        readme: The text of README.md.
        urls: The project's URLs of pyproject.toml. Without ``Repository`` a link becomes its text,
            and a picture is left out.
    """
    repository = urls.get("Repository", "").rstrip("/")

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        if not repository:
            return "" if picture else text
        if path.startswith("#"):
            return f"[{text}]({repository}{path})"
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    return _LINK.sub(absolute, readme)
