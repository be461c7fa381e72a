"""The pages: their code runs, their links exist, and the site needs no network."""

import inspect
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pages
import pytest
import torch
from pages import DOCS, REPOSITORY

import sgdr_fused
from sgdr_fused import FusedSGDR
from sgdr_fused.snapshots import Snapshots

PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
PROSE = [*PAGES, *(REPOSITORY / name for name in ("CHANGELOG.md", "CONTRIBUTING.md"))]
FOR_GPU = [page for page in PAGES if any(pages.GPU in b.needs for b in pages.blocks(page))]


def by_name(page):
    return page.stem


# Run by tests/trainers/, a section at a time: they need other libraries; and by tests/distributed/.
RUN_ELSEWHERE = ("recipes", "migration", "distributed")


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in RUN_ELSEWHERE], ids=by_name)
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(page, pages.prelude())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("page", FOR_GPU, ids=by_name)
def test_code_on_the_page_runs_on_a_gpu(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(page, pages.prelude(), with_gpu=True)


DOCUMENTED = {
    "EmaSchedule": sgdr_fused.EmaSchedule,
    "FusedSGDR": FusedSGDR,
    "FusedSGDR.step_in_backward": FusedSGDR.step_in_backward,
    "FusedSGDR.register_restart_hook": FusedSGDR.register_restart_hook,
    "Snapshots": Snapshots,
    "fit_T_0": sgdr_fused.fit_T_0,
    "lr_range_test": sgdr_fused.lr_range_test,
    "plot_schedule": sgdr_fused.plot_schedule,
    "save": sgdr_fused.save,
}


@pytest.mark.parametrize("documented", DOCUMENTED.values(), ids=DOCUMENTED.keys())
def test_example_in_the_docstring_runs(documented, tmp_path, monkeypatch):
    """torch's style: each line of code after ``>>>``, then what its last line gives."""
    monkeypatch.chdir(tmp_path)
    docstring = (inspect.getdoc(documented) or "") + "\n"
    examples = re.findall(r"((?:^ *>>> .*\n)+)(?: *([^>\s].*))?", docstring, re.M)
    assert sum(code.count(">>>") for code, _ in examples) == docstring.count(">>>") > 0
    for example in examples:
        lines = [line.partition(">>> ")[2] for line in example[0].splitlines()]
        names = vars(sgdr_fused) | pages.prelude()
        names |= {"Snapshots": Snapshots, "sgdr_fused": sgdr_fused}
        names["optimizer"] = FusedSGDR(names["model"].parameters(), lr=0.1, T_0=10)
        exec("\n".join(lines if not example[1] else lines[:-1]), names)
        if example[1]:
            assert repr(eval(lines[-1], names)) == example[1]


@pytest.mark.parametrize("page", PROSE, ids=by_name)
def test_links_are_well_formed_and_files_exist(page):
    """Anchors are checked when the site is built; web addresses are not visited."""
    for link in pages.links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
        elif parts.path:
            assert (page.parent / parts.path).exists(), link


# -------------------------------------------------------------------------------------- the site


class _Resources(HTMLParser):
    """Addresses that a browser fetches to show a page."""

    def __init__(self, html):
        super().__init__()
        self.addresses = []
        self.formulas = 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.formulas += tag == "math"
        if tag in ("img", "script", "iframe", "source"):
            self.addresses.append(attributes.get("src"))
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload"):
            self.addresses.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the built site. A page in no table of contents, or a dead link, is an error."""
    for module in ("sphinx", "myst_parser", "furo", "latex2mathml"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {page.relative_to(folder).as_posix(): page for page in folder.rglob("*.html")}


def test_site_has_every_page(site):
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} | {"api.html"} <= site.keys()


def test_site_is_readable_without_a_network(site):
    for name, page in site.items():
        for address in _Resources(page.read_text()).addresses:
            assert address is None or not urlsplit(address).netloc, (name, address)


def test_formulas_are_mathml(site):
    for name in ("schedule.html", "api.html"):
        html = site[name].read_text()
        assert _Resources(html).formulas > 0
        assert r"\eta" not in re.sub(r"<annotation.*?</annotation>", "", html)


def test_reference_documents_every_public_name(site):
    html = site["api.html"].read_text()
    for name in sgdr_fused.__all__:
        assert f'id="sgdr_fused.{name}"' in html
    for name, member in vars(sgdr_fused.FusedSGDR).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            assert f'id="sgdr_fused.FusedSGDR.{name}"' in html, name


# ---------------------------------------------------------------------------- the machinery itself


@pytest.mark.parametrize(
    "page",
    {
        "a name that nobody made": "```python\nnobody\n```\n",
        "another output": "```python\nprint(1)\n```\n\n```output\n2\n```\n",
        "no error": "<!-- raises ValueError -->\n```python\nint('1')\n```\n",
        "another error": "<!-- raises TypeError -->\n```python\nint('x')\n```\n",
        "a warning": "```python\nimport warnings\nwarnings.warn('x', stacklevel=1)\n```\n",
        "bad syntax for a GPU": "<!-- needs a GPU -->\n```python\nx =\n```\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_wrong_page_fails(page, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page[1])
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises((NameError, AssertionError, SyntaxError, ValueError, UserWarning)),
    ):
        pages.run(path, pages.prelude())


def test_right_page_passes(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nx = 1\n```\ntext\n```python\nprint(x)\n```\n\n```output\n1\n```\n"
        "<!-- raises ValueError -->\n```python\nint('x')\n```\n"
        "<!-- needs a GPU -->\n```python\nnobody\n```\n"
        "<!-- needs torch, no_such_module -->\n```python\nx = 2\n```\n"
    )
    names = pages.prelude()
    with pytest.raises(pytest.skip.Exception):
        pages.run(path, names)
    assert names["x"] == 1
