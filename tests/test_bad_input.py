"""Each argument is given each wrong value: the error names both, and nothing has changed.

The arguments, values and calls are in bad_input.py, which also makes docs/errors.md.
"""

import copy

import pytest
import torch
from bad_input import (
    CALLS,
    PAGE,
    RIGHT,
    RIGHT_IN_GROUP,
    VALUES,
    page_with_tables,
    wrong_values,
)
from pair import ROLES, assert_same_state, give_gradients, make_params

from sgdr_fused import FusedSGDR
from sgdr_fused.options import OPTIONS
from sgdr_fused.values import shown

PER_GROUP = {option.name: RIGHT[option.name] for option in OPTIONS if option.per_group}
IN_GROUP = PER_GROUP | RIGHT_IN_GROUP
OF_ALL_GROUPS = {name: right for name, right in RIGHT.items() if name not in PER_GROUP}
PLAIN = (bool, int, float, str, type(None), torch.dtype)


def each(arguments):
    return pytest.mark.parametrize(("name", "right"), arguments.items(), ids=arguments.keys())


def running_optimizer(backend):
    """An optimizer of two named groups after two steps, with gradients for the next."""
    params = make_params([17, 5, 9])
    groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1]), ("c", params[2])]}]
    options = {"momentum": 0.9, "weight_decay": 1e-2, "ema_decay": 0.9, "max_grad_norm": 1.0}
    optimizer = FusedSGDR(groups, lr=0.1, T_0=3, backend=backend, **options)
    for step in range(2):
        give_gradients(step, params)
        optimizer.step()
    give_gradients(2, params)
    return optimizer, params


def everything(optimizer, params):
    """Tensors as bytes, and the very objects in the groups, the state and the optimizer."""
    state = [optimizer.state.get(param, {}) for param in params]
    tensors = [*params, *(of_param[role] for of_param in state for role in ROLES & of_param.keys())]
    return {
        "bytes": [tensor.detach().numpy().tobytes() for tensor in tensors],
        "groups": [
            [(id(group), key, id(value)) for key, value in group.items()]
            for group in optimizer.param_groups
        ],
        "params": [[id(param) for param in group["params"]] for group in optimizer.param_groups],
        "state": [(id(o), key, id(value)) for o in state for key, value in o.items()],
        "all of it": (id(optimizer.state), len(optimizer.state), id(optimizer.param_groups)),
        "defaults": dict(optimizer.defaults),
        "clipping": (optimizer.max_grad_norm, optimizer.skip_nonfinite),
        "step": [(group["step"], group["lr"]) for group in optimizer.param_groups],
    }


def assert_names(error, name, value, label):
    assert type(error) is ValueError, (name, label, error)
    assert f"{name} must be" in str(error), (name, label, error)
    assert shown(value) in str(error), (name, label, error)


def assert_each_is_refused(optimizer, params, name, right, give):
    """Gives an argument each wrong value, and steps on as if nothing had happened."""
    before = everything(optimizer, params)
    for label, value in wrong_values(right):
        try:
            give(value)
        except ValueError as error:
            assert_names(error, name, value, label)
        else:
            pytest.fail(f"{name}={label} was taken")
        assert everything(optimizer, params) == before, label
    expected, expected_params = running_optimizer(optimizer.backend)
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, params, expected, expected_params)


@each(RIGHT)
def test_constructor_names_argument_and_value(name, right):
    options = {"lr": 0.1, "momentum": 0.9, "T_0": 10}
    for label, value in wrong_values(right):
        try:
            FusedSGDR(make_params([3]), **options | {name: value})
        except ValueError as error:
            assert_names(error, name, value, label)
        else:
            pytest.fail(f"{name}={label} was taken")


@each(RIGHT)
def test_values_in_the_range_are_taken_as_plain_ones(name, right):
    options = {"lr": 1e30, "momentum": 0.9, "T_0": 1}
    for label in right:
        optimizer = FusedSGDR(make_params([3]), **options | {name: VALUES[label]})
        stored = optimizer.param_groups[0].get(name, getattr(optimizer, name, None))
        assert stored == VALUES[label], label
        assert type(stored) in PLAIN, label


@each(IN_GROUP)
def test_value_written_into_a_group_is_refused_by_the_next_step(backend, name, right):
    optimizer, params = running_optimizer(backend)
    group = optimizer.param_groups[1]
    good = group[name]

    def write(value):
        group[name] = value
        try:
            optimizer.step()
        finally:
            assert group[name] is value
            group[name] = good

    assert_each_is_refused(optimizer, params, name, right, write)


@each(PER_GROUP)
def test_option_of_a_new_group_is_refused(backend, name, right):
    optimizer, params = running_optimizer(backend)
    new = torch.nn.Parameter(torch.ones(3))

    def add(value):
        optimizer.add_param_group({"params": [("new", new)], name: value})

    assert_each_is_refused(optimizer, params, name, right, add)


@each(IN_GROUP | {name: OF_ALL_GROUPS[name] for name in ("max_grad_norm", "skip_nonfinite")})
def test_entry_of_a_state_dict_is_refused(backend, name, right):
    optimizer, params = running_optimizer(backend)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for of_param in state_dict["state"].values():
        of_param["momentum_buffer"].zero_()

    def load(value):
        for group in state_dict["param_groups"]:
            group[name] = value
        optimizer.load_state_dict(state_dict)

    assert_each_is_refused(optimizer, params, name, right, load)


@each({name: OF_ALL_GROUPS[name] for name in ("max_grad_norm", "skip_nonfinite")})
def test_option_of_the_whole_optimizer_is_refused_when_it_is_set(backend, name, right):
    optimizer, params = running_optimizer(backend)
    assert_each_is_refused(
        optimizer, params, name, right, lambda value: setattr(optimizer, name, value)
    )


@pytest.mark.parametrize(
    ("call", "error", "text"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS]
)
def test_wrong_call_is_refused_and_changes_nothing(backend, call, error, text):
    optimizer, params = running_optimizer(backend)
    before = everything(optimizer, params)
    with pytest.raises(error) as raised:
        call(optimizer)
    assert text in str(raised.value)
    assert everything(optimizer, params) == before
    expected, expected_params = running_optimizer(backend)
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, params, expected, expected_params)


def test_every_argument_is_in_the_table():
    assert list(RIGHT) == [option.name for option in OPTIONS]
    assert set().union(*RIGHT.values(), *RIGHT_IN_GROUP.values()) <= VALUES.keys()


def test_page_of_errors_shows_the_table():
    page = PAGE.read_text()
    assert page == page_with_tables(page), "run PYTHONPATH=. python tests/bad_input.py"
