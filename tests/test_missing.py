"""The tests themselves: what is not installed makes them skip, and say what to install."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from missing import EXTRAS, how_to_install, with_advice

REPOSITORY = Path(__file__).parent.parent
PYPROJECT = REPOSITORY / "pyproject.toml"
in_checkout = pytest.mark.skipif(not PYPROJECT.exists(), reason="installed without its sources")
# Runs pytest in a Python that does not find some modules. torch asks find_spec() for some of them,
# so that must be None.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

missing, found = sys.argv[1].split(","), PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name in missing else found(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
import pytest

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def run_without(modules, *args, repository=REPOSITORY, **variables):
    """What pytest prints where modules are not installed; it must succeed."""
    command = [sys.executable, "-c", WITHOUT, modules, *args]
    # hypothesis has a plugin, which would want it.
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    ran = subprocess.run(
        command, cwd=repository, env=os.environ | variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return " ".join(ran.stdout.split())


@pytest.fixture
def sources(tmp_path):
    """A copy of the package and its tests, without a build."""
    for folder in ("sgdr_fused", "csrc", "tests"):
        unwanted = shutil.ignore_patterns("_native*", "__pycache__")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=unwanted)
    shutil.copy(PYPROJECT, tmp_path)
    return tmp_path


@in_checkout
def test_tests_without_the_native_backend_skip_or_run_by_the_reference(sources):
    """100 of them failed: those that ask for native, and those that met the warning of "auto"."""
    printed = run_without(
        "",
        "tests/test_errors.py::test_state_of_a_parameter_must_be_a_dict",
        "tests/test_errors.py::test_T_0_may_be_given_in_each_group_only",
        "tests/test_errors.py::test_restart_with_an_invalid_option_restarts_no_group",
        "tests/test_errors.py::test_options_that_exclude_each_other_are_refused_in_a_new_group",
        repository=sources,
        PYTHONPATH=str(sources),
        SGDR_FUSED_CACHE=str(sources / "empty"),
    )
    assert re.search(r"tests/test_errors.py:\d+: the native backend is not built", printed)
    assert "6 passed, 3 skipped" in printed


@in_checkout
def test_tests_without_optional_modules_skip_and_name_the_extra():
    """The import of hypothesis was an error, and skips did not say what to install."""
    printed = run_without(
        "hypothesis,matplotlib,sklearn,transformers",
        *("tests/test_fuzz.py", "tests/test_plot_schedule.py"),
        *("tests/test_demo.py", "tests/trainers/test_hugging_face.py"),
        "tests/test_docs.py::test_example_in_the_docstring_runs[plot_schedule]",
    )
    for module in ("hypothesis", "matplotlib", "sklearn"):
        assert f"""No module named '{module}'; run: pip install ".[test]" """ in printed, module
    assert """No module named 'transformers'; run: pip install ".[trainers]" """ in printed
    assert "passed" not in printed


@in_checkout
@pytest.mark.parametrize("module", EXTRAS)
def test_extra_that_is_named_brings_the_module(module):
    package = "scikit-learn" if module == "sklearn" else module.replace("_", "-")
    extra = re.search(rf"^{EXTRAS[module]} = \[(.*)\]$", PYPROJECT.read_text(), re.MULTILINE)[1]
    assert re.search(rf'"{package}\b', extra)


@pytest.mark.parametrize(
    ("reason", "command"),
    [
        ("No module named 'sklearn.datasets'", 'pip install ".[test]"'),
        ("could not import 'timm.optim': No module named 'torchvision'", "pip install --no-deps"),
        ("No module named 'optax'", 'pip install ".[peers]"'),
        ("there is no GPU", ""),
        ("No module named 'horovod'", ""),
    ],
)
def test_command_installs_the_module_of_the_message(reason, command):
    assert how_to_install(reason).startswith(command)
    assert with_advice(with_advice(reason)) == with_advice(reason)
    assert (with_advice(reason) == reason) is not bool(command)
