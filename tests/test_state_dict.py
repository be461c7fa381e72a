"""A training that is saved, loaded, copied or pickled continues bit for bit."""

import copy
import io
import pickle
from pathlib import Path

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

from sgdr_fused import FusedSGDR, load

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


def sparse_buffer(state_dict):
    state_dict["state"][2]["momentum_buffer"] = torch.ones(33).to_sparse()


def complex_buffer(state_dict):
    state_dict["state"][2]["momentum_buffer"] = torch.ones(33, dtype=torch.cfloat)


def buffer_without_memory(state_dict):
    state_dict["state"][2]["momentum_buffer"] = torch.ones(33, device="meta")


def count_that_is_none(state_dict):
    state_dict["state"][2]["n_averaged"] = "3"


def state_that_is_no_dict(state_dict):
    state_dict["state"] = [{}, {}, {}]


def state_of_a_parameter_that_is_no_dict(state_dict):
    state_dict["state"][2] = 3


def group_that_is_no_dict(state_dict):
    state_dict["param_groups"][1] = ["params"]


def group_without_params(state_dict):
    del state_dict["param_groups"][0]["params"]


def groups_that_differ_in_clipping(state_dict):
    state_dict["param_groups"][0]["max_grad_norm"] = 3.0


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
    sparse_buffer,
    complex_buffer,
    buffer_without_memory,
    count_that_is_none,
    state_that_is_no_dict,
    state_of_a_parameter_that_is_no_dict,
    group_that_is_no_dict,
    group_without_params,
    groups_that_differ_in_clipping,
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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_load_changes_nothing(backend, error):
    """By an error of the user's own hook, or by Ctrl-C in the last moment."""
    saved, saved_params = make_optimizer(backend, seed=1, momentum=0.5)
    run(saved, saved_params, 0, 4)
    optimizer, params = make_optimizer(backend)
    expected, expected_params = make_optimizer(backend)
    run(optimizer, params, 0, 2)
    run(expected, expected_params, 0, 2)
    before, groups, defaults = (
        snapshot(optimizer, params),
        optimizer.param_groups,
        optimizer.defaults,
    )

    def fail(_):
        raise error("from the hook")

    hook = optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(error, match="from the hook"):
        optimizer.load_state_dict(saved.state_dict())
    hook.remove()
    assert_unchanged(before, optimizer, params)
    assert optimizer.param_groups is groups
    assert optimizer.defaults == defaults
    run(optimizer, params, 2, 5)
    run(expected, expected_params, 2, 5)
    assert_same(optimizer, params, expected, expected_params)


# -------------------------------------------------------------------------------- other optimizers

OTHERS = {
    "Adam": lambda params: torch.optim.Adam(params),
    "AdamW": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "NAdam": lambda params: torch.optim.NAdam(params),
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params),
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "Rprop": lambda params: torch.optim.Rprop(params),
    "LBFGS": lambda params: torch.optim.LBFGS(params),
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (OTHERS["Adam"], "'betas'"),
        (OTHERS["AdamW"], "'amsgrad'"),
        (OTHERS["NAdam"], "'momentum_decay'"),
        (OTHERS["RMSprop"], "'alpha'"),
        (OTHERS["Adagrad"], "'lr_decay'"),
        (OTHERS["Adadelta"], "'rho'"),
        (OTHERS["Rprop"], "'etas'"),
        (OTHERS["LBFGS"], "'history_size'"),
    ],
    ids=OTHERS.keys(),
)
def test_state_dict_of_another_optimizer_is_refused(backend, make, found, steps_before):
    """Adam's was taken without a word: its exp_avg stayed in the state, and lr became 0.001."""
    theirs = make_params(SIZES)
    other = make(theirs)
    give_gradients(0, theirs)
    for _ in range(steps_before):
        other.step(lambda: torch.zeros(()))
    params = make_params(SIZES)
    optimizer = FusedSGDR(params, backend=backend, **OPTIONS)
    run(optimizer, params, 0, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=f"lacks .*'momentum|dampening'.* and has .*{found}"):
        optimizer.load_state_dict(other.state_dict())
    assert_unchanged(before, optimizer, params)


def test_state_that_sgd_does_not_have_is_refused(backend):
    """The groups of some optimizers have all the entries of SGD's, and more."""
    params = make_params(SIZES)
    optimizer = FusedSGDR(params, backend=backend, **OPTIONS)
    state_dict = torch.optim.SGD(make_params(SIZES), lr=0.1, momentum=0.9).state_dict()
    state_dict["state"] = {0: {"momentum": torch.ones(65)}}
    with pytest.raises(ValueError, match="its state has 'momentum'"):
        optimizer.load_state_dict(state_dict)
    assert not optimizer.state


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"differentiable": True}, {"maximize": True}]
)
def test_state_dict_of_any_sgd_is_loaded(backend, options):
    theirs = make_params(SIZES)
    sgd = torch.optim.SGD(theirs, lr=0.3, momentum=0.8, **options)
    if "differentiable" not in options:
        give_gradients(0, theirs)
        sgd.step()
    ours = copies_of(theirs)
    optimizer = FusedSGDR(ours, lr=0.1, T_0=1000, backend=backend)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["maximize"]) == (0.3, 0.8, "maximize" in options)
    for our, their in zip(ours, theirs, strict=True):
        buffer = momentum_of(sgd, their)
        assert buffer is None or torch.equal(momentum_of(optimizer, our), buffer)


def test_checkpoint_of_version_0_1_0_continues(backend):
    """docs/stability.md promises it. The file stays as it is; later versions add theirs.

    It holds the training below after five steps, and its parameters and averages after seven.
    """
    saved = load(Path(__file__).parent / "checkpoint-0.1.0.pt")
    optimizer, params = make_optimizer(backend, ema_decay=0.5, max_grad_norm=9.0)
    optimizer.load_state_dict(saved["optimizer"])
    set_values(params, saved["params"])
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]
    assert optimizer.param_groups[0]["ema_decay"] == 0.9
    assert optimizer.max_grad_norm == 1.0
    run(optimizer, params, 5, 7)
    # Not to the bit: another machine's cosine may differ in its last one.
    torch.testing.assert_close([p.detach() for p in params], saved["params_after_7_steps"])
    with optimizer.swap_ema():
        torch.testing.assert_close([p.detach() for p in params], saved["averages_after_7_steps"])


def test_state_dict_of_an_older_version_is_loaded(backend):
    """Options that it does not have stay as they are."""
    saved, saved_params = make_optimizer(backend, seed=1)
    run(saved, saved_params, 0, 4)
    state_dict = copy.deepcopy(saved.state_dict())
    newer = ("seed", "skipped_steps", "max_grad_norm", "skip_nonfinite", "master_weights")
    for group in state_dict["param_groups"]:
        for name in newer:
            del group[name]
    optimizer, params = make_optimizer(backend, seed=1, max_grad_norm=5.0)
    set_values(params, saved_params)
    optimizer.load_state_dict(state_dict)
    assert optimizer.max_grad_norm == 5.0
    optimizer.max_grad_norm = None
    run(saved, saved_params, 4, 8)
    run(optimizer, params, 4, 8)
    assert_same(optimizer, params, saved, saved_params)


# -------------------------------------------------------------------------- names of the parameters


def named_optimizer(backend, *groups_of_names, **options):
    """An optimizer of named parameters of one size; its parameters by name."""
    params = {name: make_params([9])[0] for names in groups_of_names for name in names}
    groups = [{"params": [(name, params[name]) for name in names]} for names in groups_of_names]
    return FusedSGDR(groups, backend=backend, **OPTIONS | {"ema_decay": 0.9} | options), params


def give_gradients_by_name(step, params):
    for name, param in params.items():
        param.grad = torch.full((9,), float(ord(name) + step))


def run_by_name(optimizer, params, start, stop):
    for step in range(start, stop):
        give_gradients_by_name(step, params)
        optimizer.step()


def test_state_is_matched_by_name_if_the_order_differs(backend):
    """torch gives b the momentum and the average of a, and overwrites the names."""
    whole, whole_params = named_optimizer(backend, "abc", "de")
    run_by_name(whole, whole_params, 0, 4)
    resumed, params = named_optimizer(backend, "cab", "ed")
    set_values(params.values(), [whole_params[name] for name in params])
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert [group["param_names"] for group in resumed.param_groups] == [list("cab"), list("ed")]
    run_by_name(whole, whole_params, 4, 7)
    run_by_name(resumed, params, 4, 7)
    for name, param in params.items():
        assert torch.equal(param, whole_params[name])
        ours, theirs = resumed.state[param], whole.state[whole_params[name]]
        assert ours.keys() == theirs.keys() == {"momentum_buffer", "ema"}
        assert all(torch.equal(ours[role], theirs[role]) for role in ours)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["abx", "de"], r"param_groups\[0\].* only the optimizer's has 'x', only the saved .*'c'"),
        (["ab", "de"], r"only the optimizer's has nothing, only the saved one 'c'"),
        (["abcx", "de"], r"only the optimizer's has 'x', only the saved one nothing"),
        (["abd", "ce"], r"'d' is in the saved param_groups\[1\]"),
        (["abcdefgxyz"], r"'b', 'c', 'd', 'e' and 5 more"),
    ],
)
def test_names_that_differ_are_an_error_that_says_which(backend, names, message):
    saved, saved_params = named_optimizer(backend, "abc", "de")
    run_by_name(saved, saved_params, 0, 2)
    optimizer, params = named_optimizer(backend, *names)
    before = snapshot(optimizer, list(params.values()))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert_unchanged(before, optimizer, list(params.values()))


@pytest.mark.parametrize("side", ["saved", "own"])
def test_state_is_matched_by_position_if_one_side_has_no_names(backend, side):
    saved, saved_params = named_optimizer(backend, "abc")
    run_by_name(saved, saved_params, 0, 2)
    state_dict = copy.deepcopy(saved.state_dict())
    if side == "saved":
        optimizer, params = named_optimizer(backend, "cab")
        del state_dict["param_groups"][0]["param_names"]
    else:
        params = dict(zip("cab", make_params([9, 9, 9]), strict=True))
        optimizer = FusedSGDR(params.values(), backend=backend, **OPTIONS | {"ema_decay": 0.9})
    optimizer.load_state_dict(state_dict)
    for ours, theirs in zip("cab", "abc", strict=True):
        assert torch.equal(
            momentum_of(optimizer, params[ours]), momentum_of(saved, saved_params[theirs])
        )
    names = optimizer.param_groups[0].get("param_names")
    assert names == (list("cab") if side == "saved" else None)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_matches_by_name_whatever_the_order(backend, flat):
    """It puts the state into our order itself, but not the names."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    how = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flat)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2)]
    names = [[*dict(models[0].named_parameters())], [*dict(models[1].named_parameters())][::-1]]
    params = [dict(model.named_parameters()) for model in models]
    whole, resumed = (
        FusedSGDR([(name, of_model[name]) for name in order], backend=backend, **OPTIONS)
        for order, of_model in zip(names, params, strict=True)
    )
    run(whole, [*params[0].values()], 0, 3)
    saved = checkpoint.get_optimizer_state_dict(models[0], whole, options=how)
    checkpoint.set_optimizer_state_dict(models[1], resumed, copy.deepcopy(saved), options=how)
    assert resumed.param_groups[0]["param_names"] == names[1]
    for name in names[0]:
        assert torch.equal(
            momentum_of(resumed, params[1][name]), momentum_of(whole, params[0][name])
        )


# ------------------------------------------------------------------- options of the whole optimizer


def test_clipping_is_saved_as_every_other_option(backend):
    whole, whole_params = make_optimizer(backend, max_grad_norm=0.5, skip_nonfinite=True)
    run(whole, whole_params, 0, 3)
    resumed, params = make_optimizer(backend, seed=1)
    set_values(params, whole_params)
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert (resumed.max_grad_norm, resumed.skip_nonfinite) == (0.5, True)
    run(whole, whole_params, 3, 6)
    run(resumed, params, 3, 6)
    assert_same(resumed, params, whole, whole_params)
    assert resumed.grad_norm == whole.grad_norm


def test_clipping_is_switched_off_by_a_state_dict_without_it(backend):
    saved, _ = make_optimizer(backend)
    optimizer, params = make_optimizer(backend, max_grad_norm=0.5, skip_nonfinite=True)
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.max_grad_norm, optimizer.skip_nonfinite) == (None, False)
    run(optimizer, params, 0, 1)
    assert optimizer.grad_norm is None


def test_clipping_stays_if_the_state_dict_does_not_mention_it(backend):
    params = make_params(SIZES)
    optimizer = FusedSGDR(params, lr=0.1, T_0=9, max_grad_norm=0.5, backend=backend)
    optimizer.load_state_dict(torch.optim.SGD(make_params(SIZES), lr=0.1).state_dict())
    assert optimizer.max_grad_norm == 0.5


def test_clipping_is_no_entry_of_a_param_group(backend):
    """It would be taken for an option of that group."""
    saved, _ = make_optimizer(backend, max_grad_norm=0.5)
    optimizer, _ = make_optimizer(backend)
    optimizer.load_state_dict(saved.state_dict())
    assert all("max_grad_norm" not in group for group in optimizer.param_groups)


def test_clipping_that_cannot_be_loaded_changes_nothing(backend):
    saved, saved_params = make_optimizer(backend, seed=1, max_grad_norm=0.5)
    run(saved, saved_params, 0, 2)
    optimizer, params = make_optimizer(backend)
    handle = optimizer.step_in_backward()
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 needs all gradients"):
        optimizer.load_state_dict(saved.state_dict())
    assert_unchanged(before, optimizer, params)
    handle.remove()


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
