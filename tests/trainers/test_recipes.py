"""docs/recipes.md: each section is a script of its own."""

import re

import pages
import pytest

RECIPES = pages.DOCS / "recipes.md"
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", RECIPES.read_text(), re.M))


@pytest.mark.parametrize("section", SECTIONS)
def test_recipe_runs(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "section.md"
    page.write_text(SECTIONS[section])
    assert any(block.language == "python" for block in pages.blocks(page))
    pages.run(page, pages.prelude())
