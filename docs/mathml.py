"""Formulas as MathML, which browsers render without LaTeX or downloads."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

# A word set letter by letter. Browsers render a math variant of whole words only as <mtext>.
_WORD = re.compile(
    r'<mi mathvariant="(normal|monospace)">[^<]*</mi>(?:<mi mathvariant="\1">[^<]*</mi>)+'
)
_LETTER = re.compile(r"<mi[^>]*>([^<]*)</mi>")


def mathml(latex: str, display: str = "inline") -> str:
    """Converts a formula to a ``<math>`` element.

    Args:
        latex: The formula; several lines are aligned at ``&``.
        display: ``"inline"`` or ``"block"``.
    """
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    return _WORD.sub(_as_text, convert(latex, display=display))


def _as_text(word: re.Match[str]) -> str:
    letters = "".join(_LETTER.findall(word[0]))
    return f'<mtext class="{word[1]}">{letters}</mtext>'


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula within a line."""
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula that stands alone."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
