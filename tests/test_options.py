"""Each option has one row in a table; everything that knows options agrees with it.

A new option needs a row in sgdr_fused/options.py, its meaning in sgdr_fused/reference/ or
schedule.py, a member in the C++ struct of a group's options, and a place in docs/. These tests
fail if one of them is forgotten.
"""

import inspect
import io
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from pair import assert_same_state, give_gradients, make_params, same_bits
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from sgdr_fused import CosineWarmRestarts, FusedSGDR, fit_T_0, native
from sgdr_fused.compiled import is_traceable
from sgdr_fused.options import GROUP_OPTIONS, OPTIONS, Clipping, Support
from sgdr_fused.reference import reference_step
from sgdr_fused.schedule import RANGES

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
    defaults = {name: argument.default for name, argument in arguments.items()}
    assert list(defaults.items()) == [(option.name, option.default) for option in OPTIONS]


def test_docstring_explains_each_option():
    args = re.search(r"\nArgs:\n(.*?)\n\n", inspect.getdoc(FusedSGDR), re.DOTALL)[1]
    assert re.findall(r"^    (\w+): ", args, re.MULTILINE) == ["params", *ROWS]


def test_options_of_the_schedule_are_those_of_cosine_warm_restarts():
    """It has their ranges, too."""
    assert [field.name for field in fields(CosineWarmRestarts)] == [*RANGES]
    for field in fields(CosineWarmRestarts):
        row = ROWS[field.name]
        assert row.per_group
        assert row.range is RANGES[field.name]
        if field.name == "lr":
            continue
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


# ------------------------------------------------------------------------- numbers of other kinds

# Exact in float32; each option with another value than its default.
PLAIN_VALUES = {
    "lr": 0.5,
    "momentum": 0.75,
    "dampening": 0.25,
    "weight_decay": 0.125,
    "T_0": 3,
    "T_mult": 2.0,
    "eta_min": 0.0625,
    "steps_per_epoch": 2,
    "anneal": "epoch",
    "warmup_steps": 2,
    "warmup_start_lr": 0.25,
    "cycle_decay": 0.5,
    "n_cycles": 4,
    "reset_momentum": True,
    "maximize": True,
    "decoupled_weight_decay": True,
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.5,
    "stochastic_rounding": True,
    "seed": 2**40,
}
KINDS = {
    "float32": {float: np.float32, int: np.int64, bool: np.bool_, str: np.str_},
    "float64": {float: np.float64, int: np.uint64, bool: np.bool_, str: np.str_},
    "array": {kind: np.asarray for kind in (float, int, bool, str)},
    "tensor": {float: torch.tensor, int: torch.tensor, bool: torch.tensor, str: str},
    "one_element": {float: np.atleast_1d, int: lambda v: torch.tensor([v]), bool: int, str: str},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def values_of_a_kind(request):
    """PLAIN_VALUES as numbers of NumPy, as tensors, ..."""
    return {name: request.param[type(value)](value) for name, value in PLAIN_VALUES.items()}


def assert_all_plain(groups):
    for group in groups:
        for name, value in group.items():
            assert type(value) in (bool, int, float, str, list, type(None)), name


def assert_trains_alike(left, right):
    sides = [o.param_groups[0]["params"] for o in (left, right)]
    for step in range(12):
        give_gradients(step, *sides)
        left.step()
        right.step()
        assert_same_state(left, sides[0], right, sides[1], f"after step {step}")


def loads_with_weights_only(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_numpy_numbers_and_tensors_are_taken_by_the_constructor(backend, values_of_a_kind):
    optimizer = FusedSGDR(make_params([33]), **values_of_a_kind, backend=backend)
    expected = FusedSGDR(make_params([33]), **PLAIN_VALUES, backend=backend)
    assert_all_plain(optimizer.param_groups)
    assert loads_with_weights_only(optimizer) == loads_with_weights_only(expected)
    assert_trains_alike(optimizer, expected)


def test_numpy_numbers_and_tensors_may_be_written_into_a_group(backend, values_of_a_kind):
    """A schedule of one's own writes group["lr"] = np.interp(...); the checkpoint did not load."""
    optimizer, expected = (FusedSGDR(make_params([33]), T_0=9, backend=backend) for _ in range(2))
    of_group = {option.name for option in GROUP_OPTIONS} & PLAIN_VALUES.keys()
    for written_to, values in ((optimizer, values_of_a_kind), (expected, PLAIN_VALUES)):
        written_to.param_groups[0].update({name: values[name] for name in of_group})
        written_to.param_groups[0]["initial_lr"] = values["lr"]
    assert loads_with_weights_only(optimizer) == loads_with_weights_only(expected)
    optimizer.param_groups[0].update({name: values_of_a_kind[name] for name in of_group})
    assert_trains_alike(optimizer, expected)
    assert_all_plain(optimizer.param_groups)


def test_lr_scaled_by_a_numpy_number_holds_for_the_next_step(backend):
    optimizer, expected = (make_optimizer(backend=backend) for _ in range(2))
    optimizer.param_groups[0]["lr"] *= np.float32(0.5)
    expected.param_groups[0]["lr"] *= 0.5
    assert_trains_alike(optimizer, expected)


def test_zero_as_an_integer_keeps_the_sign_of_zero(backend):
    """The step is p + (-lr) * g, and an integer has no negative zero."""
    optimizer = FusedSGDR(make_params([5]), lr=0, eta_min=0, n_cycles=1, T_0=3, backend=backend)
    (param,) = optimizer.param_groups[0]["params"]
    with torch.no_grad():
        param.fill_(-0.0)
    before = param.detach().clone()
    for _ in range(6):
        optimizer.param_groups[0]["lr"] = 0
        param.grad = torch.ones(5)
        optimizer.step()
        assert same_bits(param.detach(), before)
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_positions_may_be_numpy_integers(backend):
    optimizer, expected = (make_optimizer(backend=backend) for _ in range(2))
    calls = []
    for o, integer in ((optimizer, np.int64), (expected, int)):
        o.seek(integer(7))
        o.register_restart_hook(lambda o: calls.append(o.cycle), group=integer(0))
        o.restart(group=integer(0))
    assert calls == [2, 2]
    assert_all_plain(optimizer.param_groups)
    assert_trains_alike(optimizer, expected)


def test_schedule_takes_numpy_numbers():
    schedule = CosineWarmRestarts(lr=np.float32(0.5), T_0=np.int64(3), T_mult=np.int32(2))
    assert schedule == CosineWarmRestarts(lr=0.5, T_0=3, T_mult=2)
    assert type(schedule.T_0) is int
    assert type(schedule.lr) is float
    assert all(type(value) is int for value in schedule.position(np.int64(5)))
    assert schedule.restarts(np.int64(10)) == [3, 9]
    assert fit_T_0(np.int64(90), np.int64(3), np.float32(2)) == 12


def test_group_may_have_entries_of_the_user(backend):
    """They are not touched, whatever they are."""
    note = np.float32(0.5)
    optimizer = FusedSGDR([{"params": make_params([3]), "note": note}], T_0=3, backend=backend)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["note"] is note


OF_OTHERS = [
    *("name", "lr_scale", "lr_mult", "wd", "max_lr", "min_lr", "swa_lr", "eta_max", "init_lr"),
    *("max_momentum", "base_momentum", "no_weight_decay", "weight_decay_mult", "decay", "T_max"),
    *("foreach", "fused", "differentiable", "betas", "eps", "layer_decay", "warmup_lr"),
]


def test_entries_of_other_libraries_are_no_misspelt_options(backend):
    """timm, MMEngine, torch's schedulers and people's own code put these into groups."""
    group = {"params": make_params([3]), **dict.fromkeys(OF_OTHERS, 1)}
    FusedSGDR([group], T_0=3, backend=backend).step()


MISSPELT = {
    "T_Mult": "T_mult",
    "T0": "T_0",
    "Lr": "lr",
    "weight_decey": "weight_decay",
    "weight-decay": "weight_decay",
    "nestrov": "nesterov",
    "damping": "dampening",
    "warmup_step": "warmup_steps",
    "inital_lr": "initial_lr",
    "max_gradnorm": "max_grad_norm",
}
misspelt = pytest.mark.parametrize(("name", "meant"), MISSPELT.items(), ids=MISSPELT)


@misspelt
def test_misspelt_option_of_a_group_is_named_with_what_was_meant(name, meant):
    """It was taken in silence, and the group trained with the default."""
    message = re.escape(f"param_groups[1] has {name!r}, which is no option; did you mean {meant!r}")
    one, other = make_params([3, 3])
    with pytest.raises(ValueError, match=message):
        FusedSGDR([{"params": [one], "T_0": 3}, {"params": [other], name: 2}], lr=0.1)
    optimizer = make_optimizer()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], name: 2})
    assert len(optimizer.param_groups) == 1


@misspelt
def test_misspelt_option_written_into_a_group_is_an_error_at_the_next_step(backend, name, meant):
    optimizer = make_optimizer(backend=backend)
    optimizer.step()
    optimizer.param_groups[0][name] = 2
    with pytest.raises(ValueError, match=f"did you mean {meant!r}"):
        optimizer.step()
    del optimizer.param_groups[0][name]
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("max_grad_norm", 1.0, 2.0),
        ("skip_nonfinite", True, False),
        ("backend", "reference", "auto"),
    ],
)
def test_option_of_the_whole_optimizer_in_a_group_must_be_the_optimizers(name, value, other):
    """Horovod and ZeroRedundancyOptimizer put every option into each group."""
    group = {"params": make_params([3]), name: value}
    FusedSGDR([group], T_0=3, **{name: value}).step()
    with pytest.raises(ValueError, match=f"{name}=.*option of the whole optimizer"):
        FusedSGDR([group], T_0=3, **{name: other})
    with pytest.raises(ValueError, match=f"{name}=.*option of the whole optimizer"):
        make_optimizer(**{name: other}).add_param_group(group)


def test_option_of_the_whole_optimizer_written_into_a_group_is_an_error_at_the_next_step(backend):
    """It had no effect, without a word."""
    optimizer = make_optimizer(backend=backend)
    optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    for _ in range(2):
        with pytest.raises(ValueError, match=r"max_grad_norm=1.0.* set optimizer\.max_grad_norm"):
            optimizer.step()
    optimizer.max_grad_norm = 1.0  # now they agree
    optimizer.step()
    # A wrapper's groups keep what the optimizer was made with.
    optimizer.max_grad_norm = 2.0
    optimizer.param_groups[0]["momentum"] = 0.8
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3


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
