"""Each option has one row in a table; everything that knows options agrees with it.

A new option needs a row in sgdr_fused/options.py, its meaning in sgdr_fused/reference/ or
schedule.py, a member in the C++ struct of a group's options, and a place in docs/. These tests
fail if one of them is forgotten.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pair import give_gradients, make_params
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from sgdr_fused import CosineWarmRestarts, FusedSGDR, native
from sgdr_fused.compiled import is_traceable
from sgdr_fused.options import GROUP_OPTIONS, OPTIONS, REQUIRED, Clipping, Support
from sgdr_fused.reference import reference_step

DOCS = Path(__file__).parent.parent / "docs"

ROWS = {option.name: option for option in OPTIONS}
each_group_option = pytest.mark.parametrize("name", [option.name for option in GROUP_OPTIONS])
needs_native = pytest.mark.skipif(native.extension is None, reason=native.why_missing)

# A value besides the default, for each option that torch's pair or the registered op lacks.
OTHER_VALUES = {
    "cycle_decay": 0.5,
    "n_cycles": 2,
    "reset_momentum": True,
    "decoupled_weight_decay": True,
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "momentum_dtype": torch.bfloat16,
    "stochastic_rounding": True,
    "master_weights": True,
}


def names_where(column, support):
    return {option.name for option in OPTIONS if getattr(option, column) is support}


def make_optimizer(**options):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "T_0": 5} | options
    return FusedSGDR(make_params([5]), **options)


# ---------------------------------------------------------------------------------- Python's side


def test_arguments_are_the_tables_rows():
    arguments = dict(inspect.signature(FusedSGDR).parameters)
    del arguments["params"]
    defaults = {
        name: REQUIRED if argument.default is inspect.Parameter.empty else argument.default
        for name, argument in arguments.items()
    }
    assert list(defaults.items()) == [(option.name, option.default) for option in OPTIONS]


def test_docstring_explains_each_option():
    args = re.search(r"\nArgs:\n(.*?)\n\n", inspect.getdoc(FusedSGDR), re.DOTALL)[1]
    assert re.findall(r"^    (\w+): ", args, re.MULTILINE) == ["params", *ROWS]


def test_options_of_the_schedule_are_those_of_cosine_warm_restarts():
    """It checks them, so the table does not."""
    for field in fields(CosineWarmRestarts):
        if field.name == "lr":
            continue
        row = ROWS[field.name]
        assert row.per_group
        assert row.range is None
        assert field.name == "T_0" or row.default == field.default


def test_param_groups_hold_each_option_that_a_group_can_have():
    (group,) = make_optimizer().param_groups
    assert {option.name for option in GROUP_OPTIONS} <= group.keys()
    assert {option.name for option in OPTIONS if not option.per_group} == {
        *Clipping._fields,
        "backend",
    }


def test_reference_reads_each_option():
    class Recorder(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    read = set()
    optimizer = make_optimizer(backend="reference", ema_decay="swa")
    groups = [Recorder(group) for group in optimizer.param_groups]
    for attempt in range(2):
        give_gradients(attempt, groups[0]["params"])
        reference_step(groups, optimizer.state)
    assert {option.name for option in GROUP_OPTIONS} <= read


def test_docs_mention_each_option():
    text = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    assert [name for name in ROWS if not re.search(rf"\b{name}\b", text)] == []


# -------------------------------------------------------------------------------- the pair's side


def test_pairs_own_options_are_in_the_table():
    of_sgd = set(inspect.signature(torch.optim.SGD).parameters)
    of_scheduler = set(inspect.signature(CosineAnnealingWarmRestarts).parameters)
    assert names_where("pair", Support.BY_NAME) == of_sgd & ROWS.keys()
    assert names_where("pair", Support.CONVERTED) >= of_scheduler & ROWS.keys()
    assert not names_where("pair", Support.DEFAULT_ONLY) & (of_sgd | of_scheduler)


def test_option_that_is_ignored_elsewhere_has_a_reason():
    """A warm-up is over when to_pair() is called; without rounding, the seed is not used."""
    ignored = {"seed", "backend"}
    assert names_where("pair", Support.NOT_NEEDED) == ignored | {"warmup_steps", "warmup_start_lr"}
    assert names_where("op", Support.NOT_NEEDED) == ignored


@pytest.mark.parametrize("name", sorted(names_where("pair", Support.DEFAULT_ONLY)))
def test_option_that_the_pair_lacks_is_refused_by_to_pair(name):
    make_optimizer().to_pair()
    optimizer = make_optimizer(**{name: OTHER_VALUES[name]})
    with pytest.raises(ValueError, match=rf"{name}=.*no counterpart"):
        optimizer.to_pair()


# ------------------------------------------------------------------------------- the native side


@needs_native
def test_schema_of_the_registered_op_is_the_tables():
    schema = torch.ops.sgdr_fused.fused_step_.default._schema
    arguments = {argument.name: argument for argument in schema.arguments if argument.kwarg_only}
    converted = {"eta_max", "T_0", "anneal_every"}
    by_name = arguments.keys() - converted - {"grad_scale", "found_inf"}
    assert by_name == names_where("op", Support.BY_NAME)
    for name in by_name:
        assert arguments[name].default_value == ROWS[name].default, name


@needs_native
@pytest.mark.parametrize("name", sorted(names_where("op", Support.DEFAULT_ONLY)))
def test_step_with_an_option_that_the_op_lacks_is_not_traced(name):
    assert is_traceable(make_optimizer().param_groups)
    optimizer = make_optimizer(**{name: OTHER_VALUES[name]})
    if ROWS[name].per_group:
        assert not is_traceable(optimizer.param_groups)
    else:
        assert Clipping(**{name: OTHER_VALUES[name]}).needs_norm


@needs_native
@each_group_option
def test_native_stepper_reads_each_option(name):
    optimizer = make_optimizer(backend="native")
    (group,) = optimizer.param_groups
    stepper = native.extension.Stepper(native.extension.StepLock(), *[lambda *_: None] * 5)
    stepper.sync([dict(group)], optimizer.state)
    del group[name]
    with pytest.raises(KeyError, match=rf"^'{name}'$"):
        stepper.sync([group], optimizer.state)
