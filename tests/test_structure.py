"""Modules import no cycle and use no private member of another; csrc/ includes upwards only."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sgdr_fused

PACKAGE = Path(sgdr_fused.__file__).parent
CSRC = Path(__file__).parent.parent / "csrc"
# A file may include what comes before it, and files of its own folder. The backends stand side by
# side: neither includes the other.
LAYERS = (
    ["sgdr_math.h"],
    ["random_rounding.h", "static_switch.h"],
    ["step_types.h"],
    ["backend.h"],
    ["cpu", "cuda"],
    ["torch"],
    ["python"],
)


def modules_in(folder):
    """The syntax tree of each module in a package's folder, by the module's name."""
    trees = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        trees[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return trees


def imported_by(tree, modules):
    """The modules of the package that a module imports, for types only or within a function too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full_names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in full_names}
    return found & modules.keys()


def import_cycle(modules):
    """The modules of a cycle; an empty list if there is none."""
    graph = {name: imported_by(tree, modules) for name, tree in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_defined_in(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def private_names_used_in(tree):
    """Members of other objects than ``self`` and ``cls``, and imported names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sgdr_fused"):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in (
            "self",
            "cls",
            "super()",
        ):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def uses_of_foreign_privates(modules):
    """Pairs of a module and a private name that only other modules of the package define."""
    defined = {name: private_names_defined_in(tree) for name, tree in modules.items()}
    everywhere = set().union(*defined.values())
    return {
        (module, name)
        for module, tree in modules.items()
        for name in (private_names_used_in(tree) & everywhere) - defined[module]
    }


def test_modules_do_not_import_each_other_in_a_circle():
    assert import_cycle(modules_in(PACKAGE)) == []


def test_no_module_uses_a_private_member_of_another():
    assert uses_of_foreign_privates(modules_in(PACKAGE)) == set()


def layer_of(path):
    """The index in LAYERS, and the entry there, of a path in csrc/."""
    part = path.relative_to(CSRC).parts[0]
    return next((i, part) for i, layer in enumerate(LAYERS) if part in layer)


def includes_of_lower_layers(path, source):
    """The files that a file in csrc/ includes against the order of LAYERS."""
    layer, part = layer_of(path)
    wrong = set()
    for name in re.findall(r'#include "(.+)"', source):
        included_layer, included_part = layer_of((path.parent / name).resolve())
        if included_part != part and included_layer >= layer:
            wrong.add(name)
    return wrong


@pytest.mark.skipif(not CSRC.exists(), reason="installed without its sources")
def test_csrc_includes_only_what_is_above():
    files = [path for path in CSRC.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert includes_of_lower_layers(path, path.read_text()) == set(), path


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("step_types.h", "backend.h"),
        ("cpu/loops.h", "../torch/internals.h"),
        ("cpu/loops.h", "../cuda/launch.h"),
        ("torch/flattener.h", "../python/state.h"),
    ],
)
def test_planted_include_of_a_lower_layer_is_noticed(file, planted):
    assert includes_of_lower_layers(CSRC / file, f'#include "{planted}"') == {planted}


@pytest.mark.skipif(not CSRC.exists(), reason="installed without its sources")
def test_only_csrc_torch_knows_torchs_internals():
    for path in CSRC.rglob("*"):
        if path.is_file() and path.parent.name != "torch":
            assert "TensorImpl" not in path.read_text(), path


def test_no_file_is_longer_than_400_lines():
    files = [*PACKAGE.rglob("*.py"), *(path for path in CSRC.rglob("*") if path.is_file())]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert not {path: length for path, length in lengths.items() if length > 400}


@pytest.mark.parametrize(
    "planted",
    [
        "from sgdr_fused.optimizer import FusedSGDR",
        "from sgdr_fused import optimizer",
        "def f():\n    import sgdr_fused.optimizer",
        "if TYPE_CHECKING:\n    from sgdr_fused.optimizer import FusedSGDR",
    ],
)
def test_planted_import_cycle_is_noticed(planted):
    modules = modules_in(PACKAGE)
    modules["sgdr_fused.ema"] = ast.parse(planted)
    assert "sgdr_fused.ema" in import_cycle(modules)


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("def f(optimizer):\n    optimizer._sync()", "_sync"),
        ("def f(optimizer):\n    return optimizer._stepper.grad_norm", "_stepper"),
        ("from sgdr_fused.options import _RANGES", "_RANGES"),
    ],
)
def test_planted_use_of_a_private_member_is_noticed(planted, name):
    modules = modules_in(PACKAGE)
    modules["sgdr_fused.ema"] = ast.parse(planted)
    assert uses_of_foreign_privates(modules) == {("sgdr_fused.ema", name)}
