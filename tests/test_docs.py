"""The pages: their code runs, their links exist, and the site needs no network."""

import dataclasses
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from email.parser import Parser
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pages
import pytest
import torch
from pages import DOCS, REPOSITORY

import sgdr_fused
from sgdr_fused import FusedSGDR, in_backward, restart_hook, snapshots, trainers
from sgdr_fused.cli.main import main
from sgdr_fused.options import OPTIONS, Support
from sgdr_fused.snapshots import Snapshots

README = REPOSITORY / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
PROSE = [
    *PAGES,
    *(REPOSITORY / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", ".github/SECURITY.md")),
]
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
    assert "[](" not in page.read_text()  # shows nothing but on the site
    for link in pages.links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
        elif parts.path:
            assert (page.parent / parts.path).exists(), link


@pytest.mark.parametrize("page", PROSE, ids=by_name)
def test_every_table_has_a_heading(page):
    for heading in re.findall(r"^(\|.*\|)\n\|[ :|-]+\|$", page.read_text(), re.M):
        assert heading.strip("| "), page


@pytest.mark.parametrize("page", PROSE, ids=by_name)
def test_code_is_as_wide_as_the_site(page):
    """More than 88 columns run off a page of the site in a window of 1300 pixels."""
    for block in pages.blocks(page):
        if block.language in ("python", "sh", "console"):
            for number, line in enumerate(block.text.splitlines(), block.line):
                assert len(line) <= 88, f"{page.name}:{number}"


def test_command_prints_what_the_page_shows(tmp_path, monkeypatch, capsys):
    """The lines below a command are some of those that it prints, in this order."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    commands = 0
    for page in PAGES:
        for block in pages.blocks(page):
            if block.language == "console":
                for command in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
                    typed, *shown = command.splitlines()
                    program, *arguments = shlex.split(typed)
                    assert program == "sgdr-fused"
                    main(arguments)
                    printed = iter(capsys.readouterr().out.splitlines())
                    assert all(line in printed for line in shown), typed
                    commands += 1
    assert commands == 4


def test_page_of_options_says_when_to_use_each_that_the_pair_lacks():
    page = (DOCS / "which_option.md").read_text()
    for option in OPTIONS:
        if option.pair in (Support.DEFAULT_ONLY, Support.NOT_NEEDED):
            assert f"`{option.name}=" in page, option.name


# ------------------------------------------------------------------------------------- the README


def test_readme_shows_first_what_it_is_then_install_code_table_and_picture():
    first_screen = README.read_text().split("\n## ")[0]
    kinds = re.findall(r"^(?:```(\w+)|(\|) ---|(!)\[)", first_screen, re.M)
    assert ["".join(kind) for kind in kinds if any(kind)] == ["sh", "python", "|", "!"]
    assert (
        len(next(b for b in pages.blocks(README) if b.language == "python").text.split("\n")) < 13
    )


def test_code_of_the_readme_needs_a_model_a_loader_and_a_loss_only():
    pages.run(README, {name: pages.prelude()[name] for name in ("model", "loader", "loss_fn")})


def test_links_of_the_readme_work_on_a_package_index(tmp_path):
    """An index has the README alone: a link relative to the repository leads nowhere there."""
    pytest.importorskip("setuptools")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"SGDR_FUSED_NATIVE": "0"},
        check=True,
    )
    metadata = Parser().parsestr((tmp_path / "sgdr_fused.egg-info" / "PKG-INFO").read_text())
    assert metadata["Description-Content-Type"] == "text/markdown"
    there = metadata["Description"] or metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", there)
    assert len(links) == len(re.findall(r"\]\(", README.read_text())) > 10
    assert all(link.startswith("https://") for link in links)
    repository = "https://github.com/sgdr-fused/sgdr_fused"
    assert f"]({repository}/blob/main/docs/install.md)" in there
    assert f"]({repository}/raw/main/docs/figures/h100.svg)" in there
    assert f"]({repository}#status)" in there


# ---------------------------------------------------------------------------- the measured numbers


@pytest.fixture(scope="module")
def tables():
    """docs/tables.py."""
    return runpy.run_path(str(DOCS / "tables.py"))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_numbers_on_the_page_are_those_of_the_results(page, tables):
    """After a new measurement run: python docs/tables.py."""
    assert tables["with_tables"](page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", PROSE, ids=by_name)
def test_no_measured_time_stands_outside_the_tables(page, tables):
    """Each has one source, a file of results: by hand it would be forgotten."""
    by_hand = tables["BLOCK"].sub("", pages.text_of(page))
    assert not re.search(r"\d\s?(µs|ms|ns)\b", by_hand), page
    assert not re.search(r"\d\s?%? (times as )?(fast|slow)", by_hand), page


def test_picture_of_the_readme_has_the_numbers_of_the_results(tables):
    picture = (DOCS / "figures" / "h100.svg").read_text()
    for case in tables["cases_of_the_picture"](tables["benchmark"](tables["GPU"])):
        steps = tables["steps_of"](case)
        for name in ("FUSED", "IN_GRAPH", "OURS", "OURS_IN_GRAPH"):
            assert tables["time"](steps[tables[name]]) in picture


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
    for module in ("sphinx", "myst_parser", "furo", "latex2mathml", "sphinx_copybutton"):
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


CLASSES = (
    FusedSGDR,
    sgdr_fused.CosineWarmRestarts,
    sgdr_fused.EmaSchedule,
    sgdr_fused.Position,
    sgdr_fused.RangeTest,
    Snapshots,
    in_backward.StepInBackward,
    restart_hook.RestartHook,
    trainers.SchedulerView,
)


def members_of(cls):
    """Names of the public methods and properties that the package gives to a class."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("sgdr_fused")]
    members = {name: member for base in reversed(ours) for name, member in vars(base).items()}
    return {
        name
        for name, member in members.items()
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }


def fields_of(cls):
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls) if field.name[0] != "_"}
    return set(getattr(cls, "_fields", ()))


def test_reference_documents_every_public_name(site):
    html = site["api.html"].read_text()
    for module in (sgdr_fused, snapshots, trainers):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in html
    assert {cls for cls in vars(sgdr_fused).values() if inspect.isclass(cls)} <= set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_reference_documents_every_public_member(cls, site):
    html = site["api.html"].read_text()
    of_class = re.search(rf'id="(sgdr_fused\.(?:\w+\.)?{cls.__name__})"', html)[1]
    for name in members_of(cls) - fields_of(cls):
        assert f'id="{of_class}.{name}"' in html, name
    for name in fields_of(cls):
        assert f"<strong>{name}</strong>" in html, name


def test_reference_names_every_command(site, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M)
    assert {"schedule", "fit"} <= set(commands)
    for command in commands:
        assert f"sgdr-fused {command}" in (DOCS / "install.md").read_text()
    assert 'href="install.html"' in site["api.html"].read_text()


def test_code_on_the_site_has_copy_buttons_and_does_not_run_off_the_page(site):
    for name in ("quick_start.html", "api.html"):
        assert "copybutton.js" in site[name].read_text()
    css = (site["index.html"].parent / "_static" / "site.css").read_text()
    assert re.search(r"div\.highlight pre {[^}]*white-space: pre-wrap", css)


def test_site_has_the_changelog(site):
    html = site["changelog.html"].read_text()
    version = re.search(r"^## ([\d.]+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)[1]
    assert version in html
    assert 'href="changelog.html"' in site["index.html"].read_text()


def test_site_links_to_the_repository_if_the_project_has_one(site):
    conf = runpy.run_path(str(DOCS / "conf.py"))
    (link,) = conf["repository_link"]({"Repository": "https://host.org/name", "Issues": "x"})
    assert link["url"] == "https://host.org/name"
    assert conf["repository_link"]({}) == []
    for shown in conf["repository_link"](conf["URLS"]):
        assert f'href="{shown["url"]}"' in site["index.html"].read_text()


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
    with pytest.raises((NameError, AssertionError, SyntaxError, ValueError, UserWarning)):
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
