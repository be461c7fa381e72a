"""What the project says about itself is the same everywhere: version, address, licences."""

import os
import re
import shutil
import subprocess
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

import sgdr_fused

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
REPOSITORY = re.search(r'^Repository = "(.+)"', PYPROJECT, re.M)[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOSTED = [*WORKFLOWS, ROOT / ".readthedocs.yaml"]
TEXTS = {".cff", ".md", ".py", ".rst", ".toml", ".yaml", ".yml"}


def by_name(path):
    return path.name


def extras():
    """The extras of pyproject.toml, each with the names of its packages."""
    table = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", PYPROJECT, re.M | re.S)[1]
    found = re.findall(r"^(\w+) = \[(.*)\]", table, re.M)
    return {name: packages(listed) for name, listed in found}


def packages(listed):
    return set(re.findall(r'"([\w-]+)', listed))


def test_address_of_the_repository_is_the_same_everywhere():
    files = [*ROOT.glob("*"), *(ROOT / ".github").rglob("*"), *(ROOT / "docs").glob("*")]
    said = {
        (path.name, address)
        for path in [*files, ROOT / ".readthedocs.yaml"]
        if path.suffix in TEXTS and path.is_file()
        for address in re.findall(r"https://[\w.]+/[\w-]+/sgdr[_-]fused\b", path.read_text())
    }
    assert {name for name, _ in said} >= {"CITATION.cff", "pyproject.toml"}
    assert {address for _, address in said} == {REPOSITORY}


def test_citation_names_this_version_and_the_paper():
    citation = (ROOT / "CITATION.cff").read_text()
    said = dict(re.findall(r"^([\w-]+): (.+)$", citation, re.M))
    assert said["version"] == sgdr_fused.__version__
    assert said["license"] == re.search(r'^license = "(.+)"', PYPROJECT, re.M)[1]
    assert said["abstract"] == re.search(r'^description = "(.+)"', PYPROJECT, re.M)[1]
    assert "arXiv:1608.03983" in citation


# ---------------------------------------------------------------------------- licences and promises


def licence_table():
    page = (ROOT / "docs" / "stability.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", page, re.M)
    return {package: (licence, use) for package, licence, use in rows}


def test_licence_of_every_dependency_is_listed():
    required = packages(re.search(r"^dependencies = \[(.*)\]", PYPROJECT, re.M)[1])
    assert required == {"torch", "ninja", "setuptools"}
    table = licence_table()
    assert table.keys() == required.union(*extras().values())
    for package in required:
        assert table[package][1] == "always"
    for extra, names in extras().items():
        for package in names - required:
            assert f"`{extra}`" in table[package][1], package


SPELLED = {
    "Apache-2.0": r"Apache-2\.0|Apache Software License|Apache( License)?,? (Version )?2",
    "BSD-3-Clause": "BSD",
    "BSD-2-Clause": "BSD",
    "PSF": "Python Software Foundation|PSF",
    "MPL-2.0": "MPL|Mozilla",
    "NVIDIA": "NVIDIA|LicenseRef",
}
"""How packages write a licence, if not by its name."""


def test_listed_licences_are_those_of_the_installed_packages():
    checked = 0
    for package, (licence, _) in licence_table().items():
        try:
            about: Message = metadata(package)
        except PackageNotFoundError:
            continue
        fields = ("License-Expression", "License", "Classifier")
        text = " ".join(said for field in fields for said in about.get_all(field, []))
        assert re.search(SPELLED.get(licence, re.escape(licence)), text), (package, text[:300])
        checked += 1
    assert checked >= 3


# ------------------------------------------------------------------ workflows, for whoever hosts it


def commands_of(workflow):
    """Its ``run:`` lines, and the commands of .readthedocs.yaml."""
    return re.findall(r"^\s*(?:- )?run: (.+)$|^ +- (pip .+)$", workflow.read_text(), re.M)


@pytest.mark.parametrize("workflow", HOSTED, ids=by_name)
def test_commands_of_the_workflow_exist(workflow):
    """It calls make targets and scripts: a step that is written there would be forgotten here."""
    makefile = (ROOT / "Makefile").read_text()
    package = (ROOT / "tests/gpu/package").read_text()
    commands = ["".join(found) for found in commands_of(workflow)]
    assert commands
    for command in commands:
        program, *words = command.split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.M), command
            for name in re.findall(r"\b([A-Z]+)=", command):
                assert re.search(rf"^{name} \?=|^#   {name} ", makefile + package, re.M), name
        elif "bash .gpu/run" in command:
            assert "cp tests/gpu/run .gpu/run" in package
            assert "venv=.venv-gpu" in package
        elif program != "pip":
            assert (ROOT / program).stat().st_mode & 0o100, command
        for listed in re.findall(r"EXTRAS=([\w,]+)|\.\[([\w,]+)\]", command):
            assert set("".join(listed).split(",")) <= extras().keys(), command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=by_name)
def test_what_the_workflow_uploads_is_made(workflow):
    made = {"docs/_build/html", "dist", ".gpu/out"}
    makefile = (ROOT / "Makefile").read_text()
    assert "SITE := docs/_build/html" in makefile
    assert set(re.findall(r"^ +path: (.+)$", workflow.read_text(), re.M)) <= made


def test_workflows_cover_every_python_and_the_oldest_torch():
    claimed = set(re.findall(r"Python :: (3\.\d+)", PYPROJECT))
    oldest = re.search(r'"torch>=([\d.]+)', PYPROJECT)[1]
    for name in ("tests.yml", "wheels.yml"):
        text = (ROOT / ".github" / "workflows" / name).read_text()
        matrix = "\n".join(re.findall(r"^ +(?:- \{ )?(?:python|torch): .*", text, re.M))
        assert set(re.findall(r'"(3\.\d+)"', matrix)) == claimed, name
        assert f"{oldest}.0" in re.findall(r"2\.\d+\.\d+", matrix), name


# ------------------------------------------------------------------------------ tested versions


def test_page_lists_the_versions_that_are_tested():
    page = (ROOT / "docs" / "install.md").read_text()
    rows = re.findall(r"^\| (3\.\d+) \| ([\d.]+), .* \| (.*) \|$", page, re.M)
    assert {python for python, _, _ in rows} == set(re.findall(r"Python :: (3\.\d+)", PYPROJECT))
    in_ci = (ROOT / ".ci" / "run").read_text()
    on_cpu = re.search(r"^TORCH \?= torch==(.+)", (ROOT / "Makefile").read_text(), re.M)[1]
    with_cuda = re.search(r"CUDA_TORCH-torch==([\d.]+)", in_ci)[1]
    assert {torch for _, torch, when in rows if "at each change" in when} == {on_cpu, with_cuda}
    assert (re.search(r"CUDA_PYTHON-(3\.\d+)", in_ci)[1], with_cuda) in {row[:2] for row in rows}
    readme = (ROOT / "README.md").read_text()
    for python, torch, _ in rows:
        assert f"torch {torch} (Python {python}" in readme


# ------------------------------------------------------------------------------------- the Makefile


def test_make_builds_again_when_a_source_has_changed(tmp_path):
    """It kept the first build, and the tests of the native backend were skipped."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    sources = [tmp_path / name for name in ("csrc/sgdr_math.h", "sgdr_fused/building/recipe.py")]
    venv = [tmp_path / ".venv" / name for name in ("bin/python", "installed", "built")]
    project = [tmp_path / name for name in ("setup.py", "pyproject.toml")]
    for time, path in enumerate([*sources, *project, *venv]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time, time))

    def is_built():
        make = ["make", "--question", ".venv/built"]
        return (
            subprocess.run(make, cwd=tmp_path, env=os.environ | {"VENV": ".venv"}).returncode == 0
        )

    assert is_built()
    for source in sources:
        os.utime(source, (100, 100))
        assert not is_built(), source
        os.utime(source, (0, 0))
