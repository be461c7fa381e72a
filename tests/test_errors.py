"""Errors come before anything is written, and name the argument and its value."""

import re

import pytest
import torch
from pair import (
    assert_unchanged,
    draw,
    give_gradients,
    make_params,
    snapshot,
)
from torch.optim import lr_scheduler

from sgdr_fused import FusedSGDR
from sgdr_fused.compiled import TracedStepper

# Options that exclude each other, and what the message has to say; bad_input.py has the values that
# are wrong alone.
EXCLUDE = {
    "eta_min": ({"eta_min": 7.0}, "eta_min=7.0 is above lr="),
    "nesterov": ({"nesterov": True}, "requires a momentum and zero dampening"),
    "T_0": ({"T_0": 2**50, "steps_per_epoch": 9}, "are more than 2**53 steps"),
    "rounding": (
        {"stochastic_rounding": True, "master_weights": True},
        "set one of the two",
    ),
}
exclude = pytest.mark.parametrize(("options", "message"), EXCLUDE.values(), ids=EXCLUDE.keys())


def running_optimizer(backend, **options):
    """An optimizer of two groups after two steps, with gradients for the next; its parameters."""
    params = make_params([65, 8, 33, 17])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "T_0": 3} | options
    optimizer = FusedSGDR(groups, backend=backend, **options)
    for step in range(2):
        give_gradients(step, params)
        optimizer.step()
    give_gradients(2, params)
    return optimizer, params


@exclude
def test_options_that_exclude_each_other_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FusedSGDR(make_params([3]), **{"lr": 0.1, "dampening": 0.2, "T_0": 5} | options)


@exclude
def test_options_that_exclude_each_other_are_refused_in_a_new_group(options, message):
    optimizer, params = running_optimizer("auto", dampening=0.2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": make_params([3], seed=1), **options})
    assert_unchanged(before, optimizer, params)
    optimizer.step()


@exclude
def test_options_that_exclude_each_other_are_refused_by_the_next_step(backend, options, message):
    optimizer, params = running_optimizer(backend, dampening=0.2)
    group = optimizer.param_groups[1]
    good = {name: group[name] for name in options}
    group.update(options)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    assert_unchanged(before, optimizer, params)

    other, other_params = running_optimizer(backend, dampening=0.2)
    group.update(good)
    optimizer.step()
    other.step()
    assert_unchanged(snapshot(other, other_params) | untold(optimizer), optimizer, params)


def untold(optimizer):
    """The parts of a snapshot that identify objects, which two optimizers do not share."""
    after = snapshot(optimizer, [])
    return {"members": after["members"], "state": after["state"]}


@pytest.mark.parametrize(
    "changes",
    [
        ({"eta_min": 5.0}, {"eta_min": 0.05}),
        ({"T_0": 0}, {"T_0": 4, "initial_lr": 0.5}),
        ({"momentum": -1}, {"momentum": 0.9, "eta_min": 0.05}),
    ],
    ids=["eta_min", "T_0", "momentum"],
)
def test_option_corrected_after_an_error_applies_from_the_next_step(backend, changes):
    optimizer, params = running_optimizer(backend)
    expected, expected_params = running_optimizer(backend)
    bad, good = changes
    optimizer.param_groups[1].update(bad)
    with pytest.raises(ValueError, match=next(iter(bad))):
        optimizer.step()
    optimizer.param_groups[1].update(good)
    optimizer.step()
    expected.param_groups[1].update(good)
    expected.step()
    assert_unchanged(snapshot(expected, expected_params) | untold(optimizer), optimizer, params)


def test_last_value_of_an_option_changed_around_a_failed_step_applies(backend):
    optimizer, params = running_optimizer(backend)
    expected, expected_params = running_optimizer(backend)
    optimizer.param_groups[0]["eta_min"] = 0.02
    dense = params[3].grad
    params[3].grad = dense.to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    params[3].grad = dense
    for running in (optimizer, expected):
        running.param_groups[0]["eta_min"] = 0.09
        running.step()
    assert_unchanged(snapshot(expected, expected_params) | untold(optimizer), optimizer, params)


def sparse_gradient(params):
    params[-1].grad = params[-1].grad.to_sparse()
    return RuntimeError, "sparse"


def gradient_of_another_shape(params):
    # A gradient's shape is checked when it is set, so change the parameter's.
    params[-1].data = params[-1].data[:5].clone()
    return ValueError, r"gradient of shape \(17,\), but the parameter's is \(5,\)"


def gradient_of_as_many_elements_in_another_shape(params):
    params[-1].data = params[-1].data.reshape(1, 17)
    return ValueError, r"gradient of shape \(17,\), but the parameter's is \(1, 17\)"


def expanded_parameter(params):
    params[-1].data = torch.ones(1).expand(17)
    return RuntimeError, "one memory address"


BAD_TENSORS = [
    sparse_gradient,
    gradient_of_another_shape,
    gradient_of_as_many_elements_in_another_shape,
    expanded_parameter,
]


def expanded_momentum_buffer(of_param):
    of_param["momentum_buffer"] = torch.ones(1).expand(17)
    return RuntimeError, "momentum_buffer has several elements at one memory address"


def integer_momentum_buffer(of_param):
    of_param["momentum_buffer"] = torch.ones(17, dtype=torch.int64)
    return ValueError, "momentum_buffer.* of dtype torch.int64"


def momentum_buffer_of_inference_mode(of_param):
    with torch.inference_mode():
        of_param["momentum_buffer"] = torch.ones(17)
    return RuntimeError, "momentum_buffer was made in inference mode"


def momentum_buffer_without_memory(of_param):
    of_param["momentum_buffer"] = torch._efficientzerotensor([17])
    return RuntimeError, "momentum_buffer is a ZeroTensor"


def momentum_buffer_of_a_transposed_shape(of_param):
    of_param["momentum_buffer"] = torch.ones(17, 1)
    return ValueError, "momentum_buffer of shape"


BAD_BUFFERS = [
    expanded_momentum_buffer,
    integer_momentum_buffer,
    momentum_buffer_of_inference_mode,
    momentum_buffer_without_memory,
    momentum_buffer_of_a_transposed_shape,
]


@pytest.mark.parametrize("spoil", BAD_BUFFERS)
def test_momentum_buffer_that_cannot_be_written_stops_the_step_before_anything_is_written(
    backend, spoil
):
    optimizer, params = running_optimizer(backend)
    error, message = spoil(optimizer.state[params[-1]])
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("spoil", BAD_TENSORS)
@pytest.mark.parametrize("last_is_new", [False, True], ids=["running", "first_step"])
def test_bad_last_parameter_stops_the_step_before_anything_is_written(backend, spoil, last_is_new):
    optimizer, params = running_optimizer(backend)
    if last_is_new:
        for param in (params[1], params[-1]):
            optimizer.state.pop(param)
    error, message = spoil(params)
    before = snapshot(optimizer, params[:-1])
    with pytest.raises(error, match=message) as raised:
        optimizer.step()
    assert 'param_groups[1]["params"][1]' in str(raised.value)
    assert_unchanged(before, optimizer, params[:-1])


@pytest.mark.parametrize("shape", [(1, 17), (17, 1), (5,)], ids=str)
@pytest.mark.parametrize("role", ["momentum_buffer", "ema"])
@pytest.mark.parametrize("reshaped", ["state", "param"])
def test_state_of_another_shape_stops_the_step_before_anything_is_written(
    backend, reshaped, role, shape
):
    """Also with the same number of elements. The state is set by hand, or its parameter changed."""
    options = {"ema_decay": 0.9, "momentum": 0} if role == "ema" else {}
    optimizer, params = running_optimizer(backend, **options)
    param = params[-1]
    of_param = optimizer.state[param]

    def reshape(tensor):
        return tensor.flatten()[: torch.Size(shape).numel()].reshape(shape).clone()

    if reshaped == "state":
        of_param[role] = reshape(of_param[role])
        message = f"{role} of shape {shape}, but the parameter's is (17,)"
    else:
        grad, param.grad = param.grad, None
        param.data = reshape(param.data)
        param.grad = reshape(grad)
        message = f"{role} of shape (17,), but the parameter's is {shape}"
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


def test_failed_step_leaves_no_trace(backend):
    optimizer, params = running_optimizer(backend)
    expected, expected_params = running_optimizer(backend)
    dense = params[-1].grad
    params[-1].grad = dense.to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    params[-1].grad = dense
    optimizer.step()
    expected.step()
    assert_unchanged(snapshot(expected, expected_params) | untold(optimizer), optimizer, params)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(5), r"momentum_buffer of shape \(5,\), but the parameter's is \(17,\)"),
        (torch.zeros(17, device="meta"), "momentum_buffer of device meta"),
        (3.0, r"momentum_buffer=3\.0"),
        (torch.zeros(17, dtype=torch.complex64), "momentum_buffer of dtype torch.complex64"),
    ],
    ids=["shape", "device", "type", "dtype"],
)
def test_bad_momentum_buffer_stops_the_step_before_anything_is_written(backend, buffer, message):
    optimizer, params = running_optimizer(backend)
    optimizer.state[params[-1]]["momentum_buffer"] = buffer
    before = snapshot(optimizer, params[:-1])
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(before, optimizer, params[:-1])
    assert optimizer.state[params[-1]]["momentum_buffer"] is buffer


def test_error_names_a_named_parameter(backend):
    (param,) = make_params([3])
    optimizer = FusedSGDR([("head.weight", param)], lr=0.1, T_0=3, backend=backend)
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        optimizer.step()


def test_integer_parameter_is_refused(backend):
    (param,) = make_params([3])
    optimizer = FusedSGDR([param], lr=0.1, T_0=3, backend=backend)
    param.grad = torch.ones(3)
    param.grad = None
    param.requires_grad_(False)
    param.data = torch.ones(3, dtype=torch.int64)
    param.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        optimizer.step()
    assert param.tolist() == [1, 1, 1]


def test_parameter_that_is_no_tensor_is_refused(backend):
    optimizer, _ = running_optimizer(backend)
    optimizer.param_groups[1]["params"].append("weight")
    with pytest.raises(TypeError, match=r'param_groups\[1\]\["params"\]\[2\] is of type str'):
        optimizer.step()


def test_parameter_listed_twice_is_refused():
    (param,) = make_params([3])
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\]"):
        FusedSGDR([param, param], lr=0.1, T_0=3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedSGDR([{"params": [param]}, {"params": [param]}], lr=0.1, T_0=3)


def test_group_on_several_devices_is_refused():
    cpu, meta = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"params\"\]\[1\] is on meta, but params\[0\] is on cpu"):
        FusedSGDR([cpu, meta], lr=0.1, T_0=3)
    FusedSGDR([{"params": [cpu]}, {"params": [meta]}], lr=0.1, T_0=3)


def test_empty_parameter_list_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedSGDR([], lr=0.1, T_0=3)


def test_tensor_lr_of_several_elements_is_refused():
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        FusedSGDR(make_params([3]), lr=torch.ones(2), T_0=3)


def test_T_0_is_required():
    with pytest.raises(TypeError, match=r"needs T_0.*param_groups\[0\] has none"):
        FusedSGDR(make_params([3]), lr=0.1)


def test_T_0_may_be_given_in_each_group_only():
    one, other = make_params([3, 3])
    optimizer = FusedSGDR([{"params": [one], "T_0": 3}, {"params": [other], "T_0": 5}], lr=0.1)
    assert [group["T_i"] for group in optimizer.param_groups] == [3, 5]
    with pytest.raises(TypeError, match=r"needs T_0.*param_groups\[1\] has none"):
        FusedSGDR([{"params": [one], "T_0": 3}, {"params": [other]}], lr=0.1)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'"):
        FusedSGDR(make_params([3]), lr=0.1, T_0=3, backend="cuda")


@pytest.mark.parametrize("name", ["foreach", "fused", "differentiable", "T0", "last_epoch"])
def test_option_that_does_not_exist_is_refused(name):
    with pytest.raises(TypeError, match=name):
        FusedSGDR(make_params([3]), lr=0.1, T_0=3, **{name: None})


SCHEDULERS = {
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3]),
    "LinearLR": lr_scheduler.LinearLR,
    "ConstantLR": lr_scheduler.ConstantLR,
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o)], []),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o)]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=10),
    "OneCycleLR, momentum stays": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=1.0, total_steps=10, cycle_momentum=False
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=1.0),
    "CyclicLR, momentum stays": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=1.0, cycle_momentum=False
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.1),
}
schedulers = pytest.mark.parametrize("wrap", SCHEDULERS.values(), ids=SCHEDULERS.keys())


@schedulers
def test_wrapping_in_a_torch_scheduler_is_refused_and_changes_nothing(backend, wrap):
    """OneCycleLR has set initial_lr to 0.04 and momentum to 0.95 by then, CyclicLR lr to 0.01."""
    optimizer, params = running_optimizer(backend)
    expected, expected_params = running_optimizer(backend)
    for each, its_params in ((optimizer, params), (expected, expected_params)):
        each.param_groups[0]["momentum"] = 0.8  # not what it was made with
        each.step()
        give_gradients(3, its_params)
    before = snapshot(optimizer, params)
    with pytest.raises(TypeError, match=r"own learning rate.*remove the scheduler"):
        wrap(optimizer)
    assert_unchanged(before, optimizer, params)
    optimizer.step()
    expected.step()
    assert_unchanged(snapshot(expected, expected_params) | untold(optimizer), optimizer, params)


@schedulers
def test_torch_scheduler_refused_within_a_compiled_training_changes_nothing(wrap):
    """The LR is a tensor then, as on a GPU, and CyclicLR writes into it."""
    params = make_params([3])
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=5, backend="native")
    optimizer._stepper = TracedStepper(optimizer._noted_groups)
    give_gradients(0, params)
    optimizer.step()
    before = {
        k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.param_groups[0].items()
    }
    with pytest.raises(TypeError, match="own learning rate"):
        wrap(optimizer)
    assert optimizer.param_groups[0] == before


def test_own_entries_named_as_a_schedulers_survive_its_refusal(backend):
    optimizer, _ = running_optimizer(backend)
    optimizer.param_groups[0]["max_lr"] = 7.0
    optimizer.step()
    with pytest.raises(TypeError, match="own learning rate"):
        SCHEDULERS["OneCycleLR"](optimizer)
    assert optimizer.param_groups[0]["max_lr"] == 7.0
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    assert "max_lr" not in optimizer.param_groups[1]


def test_schedulers_that_do_not_attach_themselves_change_nothing(backend):
    """Only their step() sets the LR, as if by hand."""
    optimizer, params = running_optimizer(backend)
    before = snapshot(optimizer, params)
    lr_scheduler.ReduceLROnPlateau(optimizer)
    assert_unchanged(before, optimizer, params)


def test_restart_after_the_last_cycle_is_refused_and_restarts_no_group(backend):
    params = make_params([3, 3])
    groups = [{"params": params[:1]}, {"params": params[1:], "n_cycles": 1}]
    optimizer = FusedSGDR(groups, lr=0.1, T_0=5, backend=backend)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="n_cycles=1"):
        optimizer.restart()
    assert_unchanged(before, optimizer, params)
    optimizer.restart(group=0)


def test_warmup_shorter_than_the_steps_taken_is_refused(backend):
    params = make_params([3])
    optimizer = FusedSGDR(params, lr=0.1, T_0=5, warmup_steps=10, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    optimizer.param_groups[0]["warmup_steps"] = 4
    with pytest.raises(ValueError, match="warmup_steps=4"):
        optimizer.step()


def test_first_cycle_may_be_practically_endless(backend):
    params = make_params([3])
    optimizer = FusedSGDR(params, lr=0.1, T_0=2**53, backend=backend)
    params[0].grad = draw([3], torch.float32, torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.get_last_lr() == [0.1]


@pytest.mark.parametrize("in_backward", [False, True])
def test_state_of_a_parameter_must_be_a_dict(in_backward):
    params = make_params([3, 4])
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=5, backend="native")
    give_gradients(0, params)
    optimizer.step()
    optimizer.state[params[1]] = None
    before = [param.detach().clone() for param in params]
    if in_backward:
        optimizer.zero_grad()
        optimizer.step_in_backward()
    with pytest.raises(TypeError, match="of type NoneType, but must be a dict"):
        params[1].sum().backward() if in_backward else optimizer.step()
    assert all(map(torch.equal, params, before))


# --------------------------------------------------------------------------------- a group is added


def interrupted_params():
    yield torch.nn.Parameter(torch.ones(3))
    raise KeyboardInterrupt


class InterruptedAtTheEnd:
    """A stepper that Ctrl-C reaches when the group is in the list already."""

    def __init__(self, stepper):
        self.stepper = stepper

    def __getattr__(self, name):
        return getattr(self.stepper, name)

    def sync(self, *_):
        raise KeyboardInterrupt


@pytest.mark.parametrize("late", [False, True])
def test_interrupted_add_param_group_adds_nothing(backend, monkeypatch, late):
    optimizer, params = running_optimizer(backend)
    before, defaults = snapshot(optimizer, params), dict(optimizer.defaults)
    new_params = make_params([3]) if late else interrupted_params()
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(optimizer, "_stepper", InterruptedAtTheEnd(optimizer._stepper))
        with pytest.raises(KeyboardInterrupt):
            optimizer.add_param_group({"params": new_params})
    assert_unchanged(before, optimizer, params)
    assert optimizer.defaults == defaults
    other, other_params = running_optimizer(backend)
    optimizer.step()
    other.step()
    assert_unchanged(snapshot(other, other_params) | untold(optimizer), optimizer, params)


def test_refused_group_is_not_written(backend):
    """The user corrects the dict and passes it again."""
    optimizer, params = running_optimizer(backend)
    group = {"params": iter(make_params([3])), "momentum": 10**400}
    with pytest.raises(ValueError, match="Invalid momentum value"):
        optimizer.add_param_group(group)
    assert group.keys() == {"params", "momentum"}
    before = snapshot(optimizer, params)
    group |= {"params": make_params([3]), "momentum": 0.5}
    optimizer.add_param_group(group)
    assert optimizer.param_groups.pop()["momentum"] == 0.5
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize(
    "container",
    [
        tuple,
        iter,
        lambda params: (param for param in params),
        lambda params: dict(enumerate(params)).values(),
        torch.nn.ParameterList,
        lambda params: filter(torch.is_tensor, params),
    ],
    ids=["tuple", "iterator", "generator", "dict_values", "ParameterList", "filter"],
)
def test_params_may_come_in_any_iterable(backend, container):
    ours, theirs = make_params([5, 3]), make_params([5, 3])
    optimizer = FusedSGDR([{"params": container(ours)}], lr=0.1, T_0=3, backend=backend)
    expected = FusedSGDR(theirs, lr=0.1, T_0=3, backend=backend)
    give_gradients(0, ours, theirs)
    optimizer.step()
    expected.step()
    assert all(map(torch.equal, ours, theirs))


def test_restart_with_an_invalid_option_restarts_no_group(backend):
    optimizer, params = running_optimizer(backend)
    optimizer.param_groups[1]["momentum"] = "0.9"
    before = snapshot(optimizer, params)
    for call in (optimizer.restart, lambda: optimizer.seek(7)):
        with pytest.raises(ValueError, match=r"momentum value: '0\.9'"):
            call()
        assert_unchanged(before, optimizer, params)


def test_seek_repairs_a_position_that_was_set_by_hand(backend):
    """The error that a step raises says: call seek()."""
    optimizer, _ = running_optimizer(backend)
    optimizer.param_groups[1]["T_i"] = None
    with pytest.raises(ValueError, match=r"T_i value: None.*call seek\(\)"):
        optimizer.step()
    optimizer.seek(7)
    assert [group["step"] for group in optimizer.param_groups] == [7, 7]
    optimizer.step()
