"""A training that is saved, loaded, copied or pickled continues bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from pair import (
    Pair,
    assert_same,
    assert_unchanged,
    copies_of,
    give_gradients,
    make_params,
    momentum_of,
    snapshot,
)

from sgdr_fused import FusedSGDR

OPTIONS = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-2,
    "nesterov": True,
    "T_0": 3,
    "T_mult": 2,
    "eta_min": 1e-3,
}
SIZES = (65, 8, 33)


def make_optimizer(backend, seed=0, dtype=torch.float32, **options):
    params = make_params(SIZES, dtype, seed)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "T_0": 4}]
    return FusedSGDR(groups, backend=backend, **OPTIONS | options), params


def run(optimizer, params, start, stop):
    for step in range(start, stop):
        give_gradients(step, params)
        optimizer.step()


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def set_values(params, values):
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


@pytest.mark.parametrize("saved_after", [0, 1, 5, 9])
def test_training_resumed_from_a_file_equals_the_uninterrupted_one(backend, dtype, saved_after):
    whole, whole_params = make_optimizer(backend, dtype=dtype)
    run(whole, whole_params, 0, saved_after)
    checkpoint = through_a_file(
        {"params": [p.detach() for p in whole_params], "optimizer": whole.state_dict()}
    )
    resumed, resumed_params = make_optimizer(backend, seed=1, dtype=dtype)
    set_values(resumed_params, checkpoint["params"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert_same(resumed, resumed_params, whole, whole_params, "after loading")
    for step in range(saved_after, saved_after + 40):
        run(whole, whole_params, step, step + 1)
        run(resumed, resumed_params, step, step + 1)
        assert_same(resumed, resumed_params, whole, whole_params, f"after step {step}")


def test_optimizer_that_has_already_run_may_resume_another_training(backend):
    whole, whole_params = make_optimizer(backend)
    run(whole, whole_params, 0, 5)
    resumed, resumed_params = make_optimizer(backend, seed=1)
    run(resumed, resumed_params, 20, 28)
    set_values(resumed_params, [p.detach() for p in whole_params])
    resumed.load_state_dict(whole.state_dict())
    run(whole, whole_params, 5, 12)
    run(resumed, resumed_params, 5, 12)
    assert_same(resumed, resumed_params, whole, whole_params)


def test_load_state_dict_restores_options(backend):
    whole, whole_params = make_optimizer(backend, momentum=0.5, T_0=7, cycle_decay=0.5, n_cycles=4)
    run(whole, whole_params, 0, 3)
    resumed, params = make_optimizer(backend)
    resumed.load_state_dict(whole.state_dict())
    for ours, theirs in zip(resumed.param_groups, whole.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
    assert [g["params"] for g in resumed.param_groups] == [params[:2], params[2:]]


def test_restart_and_lr_set_by_hand_are_saved(backend):
    whole, whole_params = make_optimizer(backend)
    run(whole, whole_params, 0, 2)
    whole.restart()
    run(whole, whole_params, 2, 3)
    whole.param_groups[0]["lr"] = 0.77
    resumed, params = make_optimizer(backend)
    set_values(params, [p.detach() for p in whole_params])
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    for step in range(3, 12):
        run(whole, whole_params, step, step + 1)
        run(resumed, params, step, step + 1)
        assert_same(resumed, params, whole, whole_params, f"after step {step}")


def test_state_dict_holds_plain_tensors_and_numbers(backend):
    optimizer, params = make_optimizer(backend)
    run(optimizer, params, 0, 2)
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert all(set(of_param) == {"momentum_buffer"} for of_param in state_dict["state"].values())
    plain = (int, float, str, bool, type(None), list)
    for group in state_dict["param_groups"]:
        assert all(type(value) in plain for value in group.values())


def test_loading_shares_no_memory_with_the_state_dict(backend):
    whole, whole_params = make_optimizer(backend)
    run(whole, whole_params, 0, 2)
    state_dict = whole.state_dict()
    kept = copy.deepcopy(state_dict)
    resumed, params = make_optimizer(backend)
    resumed.load_state_dict(state_dict)
    run(resumed, params, 2, 5)
    for i, of_param in kept["state"].items():
        assert torch.equal(state_dict["state"][i]["momentum_buffer"], of_param["momentum_buffer"])
        assert torch.equal(momentum_of(whole, whole_params[i]), of_param["momentum_buffer"])
    assert state_dict["param_groups"] == kept["param_groups"]


def test_loading_its_own_state_dict_changes_nothing(backend):
    optimizer, params = make_optimizer(backend)
    run(optimizer, params, 0, 4)
    before = snapshot(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(before, optimizer, params)


# ------------------------------------------------------------------------------ torch.optim.SGD's


def test_state_dict_of_plain_sgd_is_loaded(backend):
    """The schedule keeps its position: SGD's state_dict has none."""
    theirs = make_params(SIZES)
    sgd = torch.optim.SGD(theirs, lr=0.3, momentum=0.8, foreach=False)
    for step in range(3):
        give_gradients(step, theirs)
        sgd.step()
    ours = copies_of(theirs)
    optimizer = FusedSGDR(ours, lr=0.1, T_0=1000, backend=backend)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["momentum"]) == (0.3, 0.3, 0.8)
    assert (group["step"], group["T_0"]) == (0, 1000)
    assert not {"foreach", "fused", "differentiable"} & set(group)
    give_gradients(3, ours, theirs)
    optimizer.step()
    sgd.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)
        assert torch.equal(momentum_of(optimizer, our), momentum_of(sgd, their))


def test_state_dict_of_sgd_with_a_scheduler_keeps_its_peak(backend):
    theirs = make_params(SIZES)
    pair = Pair(theirs, lr=0.3, T_0=10)
    for _ in range(4):
        pair.step()
    optimizer = FusedSGDR(make_params(SIZES), lr=0.1, T_0=10, backend=backend)
    optimizer.seek(4)
    optimizer.load_state_dict(pair.sgd.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.3
    assert optimizer.get_last_lr() == pair.scheduler.get_last_lr()


def test_plain_sgd_loads_our_state_dict(backend):
    ours = make_params(SIZES)
    optimizer = FusedSGDR(ours, backend=backend, **OPTIONS | {"T_0": 1000})
    run(optimizer, ours, 0, 3)
    theirs = copies_of(ours)
    sgd = torch.optim.SGD(theirs, lr=1.0, foreach=False)
    sgd.load_state_dict(through_a_file(optimizer.state_dict()))
    assert sgd.param_groups[0]["lr"] == optimizer.get_last_lr()[0]
    give_gradients(3, ours, theirs)
    optimizer.step()
    sgd.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


# ------------------------------------------------------------------------------------------ misfits


def another_number_of_groups(state_dict):
    state_dict["param_groups"].pop()


def another_number_of_params(state_dict):
    state_dict["param_groups"][1]["params"].append(3)


def buffer_of_another_shape(state_dict):
    state_dict["state"][2]["momentum_buffer"] = torch.ones(34)


def buffer_that_is_no_tensor(state_dict):
    state_dict["state"][2]["momentum_buffer"] = 3


def buffer_that_would_broadcast(state_dict):
    state_dict["state"][2]["momentum_buffer"] = torch.ones(1)


def bad_value(name, value):
    def spoil(state_dict):
        state_dict["param_groups"][1][name] = value

    spoil.__name__ = f"{name}={value}"
    return spoil


MISFITS = [
    another_number_of_groups,
    another_number_of_params,
    buffer_of_another_shape,
    buffer_that_is_no_tensor,
    buffer_that_would_broadcast,
    bad_value("momentum", -1.0),
    bad_value("T_0", 0),
    bad_value("eta_min", 5.0),
    bad_value("lr", float("nan")),
    bad_value("initial_lr", -1.0),
    bad_value("initial_lr", None),
    bad_value("step", -1),
    bad_value("step", None),
    bad_value("cycle", -1),
    bad_value("T_cur", 2.5),
    bad_value("T_cur", "3"),
    bad_value("T_cur", -1),
    bad_value("T_i", 0),
    bad_value("T_i", None),
]


@pytest.mark.parametrize("spoil", MISFITS, ids=lambda spoil: spoil.__name__)
def test_state_dict_that_does_not_fit_is_an_error_and_changes_nothing(backend, spoil):
    saved, saved_params = make_optimizer(backend, seed=1)
    run(saved, saved_params, 0, 4)
    state_dict = copy.deepcopy(saved.state_dict())
    optimizer, params = make_optimizer(backend)
    expected, expected_params = make_optimizer(backend)
    run(optimizer, params, 0, 2)
    run(expected, expected_params, 0, 2)
    before = snapshot(optimizer, params)
    spoil(state_dict)
    with pytest.raises(ValueError):  # noqa: PT011  (torch's own wording for the first two)
        optimizer.load_state_dict(state_dict)
    assert_unchanged(before, optimizer, params)
    run(optimizer, params, 2, 5)
    run(expected, expected_params, 2, 5)
    assert_same(optimizer, params, expected, expected_params)


def test_error_names_what_does_not_fit(backend):
    saved, saved_params = make_optimizer(backend)
    run(saved, saved_params, 0, 1)
    state_dict = saved.state_dict()
    buffer_of_another_shape(state_dict)
    with pytest.raises(ValueError, match=r"does not fit: param_groups\[1\].*\(33,\).*\(34,\)"):
        make_optimizer(backend)[0].load_state_dict(state_dict)


# ------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("steps_before", [0, 4])
def test_copy_continues_independently_and_identically(backend, duplicate, steps_before):
    optimizer, params = make_optimizer(backend)
    run(optimizer, params, 0, steps_before)
    other, other_params = duplicate((optimizer, params))
    assert other.backend == backend
    before = snapshot(optimizer, params)
    run(other, other_params, steps_before, steps_before + 8)
    assert_unchanged(before, optimizer, params)
    run(optimizer, params, steps_before, steps_before + 8)
    assert_same(other, other_params, optimizer, params)


def test_dtype_of_the_momentum_follows_the_parameter_at_load(backend):
    """torch's load_state_dict casts to the parameter's dtype, too."""
    saved, saved_params = make_optimizer(backend)
    run(saved, saved_params, 0, 2)
    optimizer, params = make_optimizer(backend, dtype=torch.float64)
    optimizer.load_state_dict(saved.state_dict())
    for own, other in zip(params, saved_params, strict=True):
        assert momentum_of(optimizer, own).dtype == torch.float64
        assert torch.equal(momentum_of(optimizer, own), momentum_of(saved, other).double())
    run(optimizer, params, 2, 4)


def test_state_dict_hooks_run_as_in_torch(backend):
    optimizer, params = make_optimizer(backend)
    run(optimizer, params, 0, 2)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, sd: sd | {"note": "hello"})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["step"]))
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == "hello"

    def at_step_9(own, loaded):
        loaded["param_groups"][0]["step"] = 9
        return loaded

    optimizer.register_load_state_dict_pre_hook(at_step_9)
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    assert seen == ["saving", 9]


def test_state_dict_without_momentum_has_no_buffers(backend):
    params = make_params(SIZES)
    optimizer = FusedSGDR(params, lr=0.1, T_0=3, backend=backend)
    run(optimizer, params, 0, 3)
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 3, 5)


def test_state_dict_keeps_parameter_names(backend):
    model = torch.nn.Linear(3, 2)
    optimizer = FusedSGDR(model.named_parameters(), lr=0.1, T_0=3, backend=backend)
    state_dict = optimizer.state_dict()
    assert state_dict["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_state_dict_of_distributed_checkpoint_is_loaded(backend):
    """torch.distributed.checkpoint stores an optimizer's state by parameter names."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    models = [torch.nn.Linear(7, 5) for _ in range(2)]
    whole, resumed = (FusedSGDR(m.parameters(), backend=backend, **OPTIONS) for m in models)
    run(whole, list(models[0].parameters()), 0, 5)
    model_state, optimizer_state = checkpoint.get_state_dict(models[0], whole)
    checkpoint.set_state_dict(
        models[1],
        resumed,
        model_state_dict=copy.deepcopy(model_state),
        optim_state_dict=copy.deepcopy(optimizer_state),
    )
    sides = [list(m.parameters()) for m in models]
    assert_same(resumed, sides[1], whole, sides[0])
    for step in range(5, 9):
        run(whole, sides[0], step, step + 1)
        run(resumed, sides[1], step, step + 1)
        assert_same(resumed, sides[1], whole, sides[0], f"after step {step}")
