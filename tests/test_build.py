"""What is built, and why; where a build is found; what happens without one."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from sgdr_fused import native
from sgdr_fused.building.recipe import BuiltFor, covers

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(native.extension is None, reason=native.why_missing)
pytest.importorskip("setuptools")


def environment(**variables):
    """The process's environment, without what concerns builds."""
    ours = ("SGDR_", "TORCH_", "CUDA_", "PYTHONPATH")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | variables


def setup(**variables):
    """Exit status and stderr of `setup.py --name`."""
    ran = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stderr


# -------------------------------------------------------------------------------- what is built


def test_no_cuda_backend_without_cuda_in_torch():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    status, said = setup()
    assert status == 0
    assert "building the CPU backend" in said
    assert "no CUDA backend: this torch is built without CUDA" in said
    status, said = setup(SGDR_FUSED_CUDA="1")
    assert status != 0
    assert "SGDR_FUSED_CUDA=1, but this torch is built without CUDA" in said


def test_cuda_backend_with_cuda_in_torch_and_nvcc():
    if torch.version.cuda is None or shutil.which("nvcc") is None:
        pytest.skip("needs a torch with CUDA, and an nvcc")
    status, said = setup()
    assert status == 0
    if "nvcc is of CUDA" in said:
        pytest.skip("nvcc is of another major version than torch's")
    assert "building the CPU and CUDA backends" in said
    assert "compute capability 7.5;8.0;8.6;8.9;9.0" in said
    assert "+PTX" in said
    status, said = setup(TORCH_CUDA_ARCH_LIST="8.0")
    assert said.count("for compute capability 8.0\n") == 1
    status, said = setup(SGDR_FUSED_CUDA="0")
    assert status == 0
    assert "no CUDA backend: SGDR_FUSED_CUDA=0" in said


def test_no_cuda_backend_without_nvcc(tmp_path):
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    status, said = setup(CUDA_HOME=str(tmp_path))
    assert status == 0
    assert "no CUDA backend: there is no nvcc" in said
    status, said = setup(CUDA_HOME=str(tmp_path), SGDR_FUSED_CUDA="1")
    assert status != 0
    assert "SGDR_FUSED_CUDA=1, but there is no nvcc" in said


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("7.5;8.0;9.0a;10.0+PTX", (12, 0), True),
        ("7.5 8.0", (8, 9), True),
        ("", (9, 0), False),
    ],
)
def test_code_runs_on_its_major_version_and_ptx_on_later_ones(architectures, capability, expected):
    assert covers(architectures, capability) is expected


def test_gpu_without_code_for_it_is_named_with_the_command(monkeypatch):
    """CUDA itself says "no kernel image is available", in the midst of a step."""
    monkeypatch.setattr(native, "built_for", BuiltFor("", "", "", "8.0;9.0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    native.check_gpu(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    expected = (
        r"built for compute capability 8.0;9.0, but cuda:1 \(a GPU\) has 12.0; run: sgdr-fused"
    )
    with pytest.raises(RuntimeError, match=expected):
        native.check_gpu(torch.device("cuda", 1))


def test_oldest_torch_is_the_same_everywhere():
    oldest = re.search(r'"torch>=([\d.]+)[;"]', (ROOT / "pyproject.toml").read_text())[1]
    for page in ("README.md", "docs/quick_start.md"):
        assert f"torch >= {oldest}" in (ROOT / page).read_text(), page
    tested = re.search(r"CUDA_TORCH-torch==([\d.]+)", (ROOT / ".ci/run").read_text())[1]
    assert tested.startswith(f"{oldest}.")


def test_older_python_is_refused_for_itself_and_not_for_its_torch():
    """In Python 3.9 pip 23 looked for torch >= 2.11 first, and explained a conflict of versions."""
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'^requires-python = ">=([\d.]+)"', project, re.M)[1]
    assert re.search(rf"\"torch>=[\d.]+; python_version >= '{oldest}'\"", project)


# -------------------------------------------------------------------------- an installed package


@pytest.fixture
def installed(tmp_path):
    """A package as pip installs it without a build: no extension; its sources within it."""
    return install(tmp_path / "site")


def install(site):
    package = site / "sgdr_fused"
    ignored = shutil.ignore_patterns("*.so", BuiltFor.FILE, "__pycache__", "csrc")
    shutil.copytree(ROOT / "sgdr_fused", package, ignore=ignored)
    shutil.copytree(ROOT / "csrc", package / "csrc")
    return package


def python(package, *arguments, **variables):
    """Runs Python, which finds that package first and an empty cache."""
    variables = {"SGDR_FUSED_CACHE": str(package.parent / "cache")} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package.parent,
        env=environment(**{"PYTHONPATH": str(package.parent)} | variables),
        capture_output=True,
        text=True,
    )


STEP = """
import warnings
import torch
from sgdr_fused import FusedSGDR, native

param = torch.nn.Parameter(torch.ones(3))
optimizer = FusedSGDR([param], lr=0.5, T_0=2)
param.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.step()
    optimizer.step()
assert torch.equal(param, torch.full([3], 1 - 0.5 - 0.25)), param
assert optimizer.uses_native is (native.extension is not None) is (not caught)
for warning in caught:
    print(warning.filename, warning.message)
"""


def place_build(folder, **built_for):
    """Puts the extension of this process where a build would be, made for something else."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(native.extension.__file__, folder)
    known = json.loads((native.folder / BuiltFor.FILE).read_text())
    (folder / BuiltFor.FILE).write_text(json.dumps(known | built_for))


def test_package_without_a_build_steps_and_warns_once_with_the_command(installed):
    ran = python(installed, "-c", STEP)
    assert ran.returncode == 0, ran.stderr
    (warning,) = ran.stdout.splitlines()
    assert warning.startswith("<string> "), "the warning points at the caller"
    assert "slower than torch.optim.SGD" in warning
    assert f"not built for torch {torch.__version__}; run: sgdr-fused build" in warning


def test_native_backend_without_a_build_is_an_error_with_the_command(installed):
    code = "import sgdr_fused as s, torch; s.FusedSGDR([torch.ones(1)], backend='native', T_0=1)"
    ran = python(installed, "-c", code)
    assert ran.returncode == 1
    assert "run: sgdr-fused build" in ran.stderr.splitlines()[-1]


@needs_native
def test_build_in_the_package_is_used(installed):
    place_build(installed)
    ran = python(installed, "-c", STEP)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


@needs_native
@pytest.mark.parametrize(
    ("built_for", "reason"),
    [
        ({"torch": "1.2.3+elsewhere"}, r"built for torch 1\.2\.3\+elsewhere, but this is "),
        ({"python": "cpython-39"}, "built for python cpython-39, but this is cpython-3"),
        ({"sources": "another"}, "built for sources another, but this is [0-9a-f]{16}"),
    ],
)
def test_build_for_something_else_is_not_used(installed, built_for, reason):
    place_build(installed, **built_for)
    ran = python(installed, "-c", STEP)
    assert ran.returncode == 0, ran.stderr
    assert re.search(f"{reason}.*; run: sgdr-fused build", ran.stdout)


@needs_native
def test_damaged_build_is_named(installed):
    place_build(installed)
    library = next(installed.glob("*.so"))
    library.write_bytes(b"no library")
    ran = python(installed, "-c", STEP)
    assert ran.returncode == 0, ran.stderr
    assert f"the native backend in {installed} does not load" in ran.stdout


def cached_build(installed, torch_version=torch.__version__, kind="cpu"):
    sources = json.loads((native.folder / BuiltFor.FILE).read_text())["sources"]
    name = f"torch-{torch_version}_{sys.implementation.cache_tag}_{sources}_{kind}"
    return installed.parent / "cache" / name


@needs_native
def test_build_in_the_cache_is_found_also_after_torch_was_upgraded(installed):
    place_build(installed, torch="1.2.3+elsewhere")
    place_build(cached_build(installed, "1.2.3+elsewhere"), torch="1.2.3+elsewhere")
    assert "sgdr-fused build" in python(installed, "-c", STEP).stdout
    place_build(cached_build(installed))
    ran = python(installed, "-c", STEP + "print(native.folder)")
    assert ran.stdout.strip() == str(cached_build(installed)), ran.stderr


@needs_native
def test_newest_build_in_the_cache_is_used(installed):
    older, newer = (cached_build(installed, kind=kind) for kind in ("9.0-PTX", "8.0-9.0-PTX"))
    place_build(newer)
    place_build(older)
    os.utime(older / BuiltFor.FILE, (1, 1))
    ran = python(installed, "-c", "from sgdr_fused import native; print(native.folder)")
    assert ran.stdout.strip() == str(newer), ran.stderr


@needs_native
def test_source_tree_that_hides_an_installed_package_is_named(tmp_path):
    """In a checkout Python imports the source tree, whatever was installed."""
    tree, site = tmp_path / "tree", install(tmp_path / "site")
    shutil.copytree(ROOT / "sgdr_fused", tree / "sgdr_fused", ignore=shutil.ignore_patterns("*.so"))
    (tree / "sgdr_fused" / BuiltFor.FILE).unlink(missing_ok=True)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "setup.py").touch()
    place_build(site)
    ran = python(tree / "sgdr_fused", "-c", STEP, PYTHONPATH=f"{tree}{os.pathsep}{site.parent}")
    assert f"this is the source tree {tree}, which hides the package installed in {site}" in (
        ran.stdout
    ), ran.stderr


# ------------------------------------------------------------------------------ sgdr-fused build


def compiler(folder, text):
    """A C++ compiler that is a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_build_without_a_compiler_says_what_to_install(installed):
    ran = python(installed, "-m", "sgdr_fused", "build", CXX="no-such-compiler")
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert "no C++ compiler 'no-such-compiler'; install one, such as g++, or set CXX" in line


@pytest.mark.parametrize("place", ["installed", "source tree"])
def test_failing_compiler_is_quoted_and_the_log_named(installed, tmp_path, place):
    """In a source tree pyproject.toml is in reach, and only setup.py knows all that it needs."""
    if place == "source tree":
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, installed.parent)
        (installed / "csrc").rename(installed.parent / "csrc")
    failing = compiler(
        tmp_path,
        'case "$*" in *--version*|*-dump*|*-v) exec c++ "$@";; esac\n'
        "echo 'x.h:1:2: fatal error: Python.h: No such file' >&2; exit 1",
    )
    ran = python(installed, "-m", "sgdr_fused", "build", CXX=failing, SGDR_FUSED_CUDA="0")
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    found = re.search(r"error: compiling failed: (.*); all of it is in (.*)", last)
    assert found[1] == "x.h:1:2: fatal error: Python.h: No such file"
    assert "fatal error: Python.h" in Path(found[2]).read_text()
    left = [p.name for p in (tmp_path / "site" / "cache").iterdir()]
    assert len(left) == 1, left
    assert left[0].endswith(".log")


@needs_native
def test_build_that_is_there_is_not_made_again(installed):
    place_build(installed, cuda_architectures="")
    ran = python(installed, "-m", "sgdr_fused", "build", CXX="true", SGDR_FUSED_CUDA="0")
    assert ran.returncode == 0, ran.stderr
    assert "already built" in ran.stderr


def test_import_builds_nothing(installed):
    ran = python(installed, "-c", STEP, CXX="false")
    assert ran.returncode == 0, ran.stderr
    assert not (installed.parent / "cache").exists()


# ----------------------------------------------------------------------------- sgdr-fused doctor


def test_doctor_without_a_build_ends_with_the_command(installed):
    ran = python(installed, "-m", "sgdr_fused", "doctor")
    assert ran.returncode == 1, ran.stderr
    assert f"torch:          {torch.__version__}" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("problem: ")
    assert ran.stdout.splitlines()[-1].endswith("run: sgdr-fused build")


@needs_native
def test_doctor_says_where_the_build_is_and_tests_it(installed):
    place_build(installed)
    ran = python(installed, "-m", "sgdr_fused", "doctor")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"native backend: {installed}" in ran.stdout
    assert "self-test:      passed on cpu" in ran.stdout
    assert "problem" not in ran.stdout


WRONG_MOMENTUM = """
import sys
from sgdr_fused.cli import self_test
from sgdr_fused.cli.main import main

right = self_test.FusedSGDR
def wrong(params, backend, **options):
    ignored = {"momentum": 0, "nesterov": False} if backend == "native" else {}
    return right(params, backend=backend, **options | ignored)
self_test.FusedSGDR = wrong
main(["doctor"])
"""


@needs_native
def test_doctor_finds_a_step_that_ignores_the_momentum(installed):
    """As a miscompiled kernel once did."""
    place_build(installed)
    ran = python(installed, "-c", WRONG_MOMENTUM)
    assert ran.returncode == 1
    assert re.search("problem: +cpu: momentum, torch.float32: differs", ran.stdout), ran.stdout
    assert "cpu: plain SGD" not in ran.stdout


# --------------------------------------------------------------------- from sources to a package


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["built later", "built at once"])
def test_source_distribution_installs_and_steps_natively(tmp_path, way):
    """sdist, wheel, an environment of its own that shares torch, self-test outside the tree."""
    sources = tmp_path / "sources"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "__pycache__", BuiltFor.FILE)
    shutil.copytree(ROOT, sources, ignore=left_out)
    build = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])('.'))"

    def made(kind, folder, **variables):
        code = [sys.executable, "-c", build, kind]
        env = environment(**variables)
        ran = subprocess.run(code, cwd=folder, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return folder / ran.stdout.splitlines()[-1]

    archive = made("build_sdist", sources, SGDR_FUSED_NATIVE="0")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    for name in ("csrc/cuda/fused_step.cu", "csrc/step_types.h", "tests/test_build.py", "Makefile"):
        assert (tree / name).exists(), name
    at_once = way == "built at once"
    wheel = made("build_wheel", tree, SGDR_FUSED_NATIVE="01"[at_once], SGDR_FUSED_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl") is not at_once

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    package = site / "sgdr_fused"
    if not at_once:
        ran = python(package, "-m", "sgdr_fused", "build", SGDR_FUSED_CUDA="0")
        assert ran.returncode == 0, ran.stderr
        assert "[" in ran.stderr, "no progress"
    ran = python(package, "-m", "sgdr_fused", "doctor")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    place = site if at_once else site / "cache"
    assert re.search(f"native backend: {place}", ran.stdout)
    assert sysconfig.get_config_var("EXT_SUFFIX") in str(list(Path(place).rglob("*.so")))
