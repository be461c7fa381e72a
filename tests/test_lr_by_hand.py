"""A learning rate that the user writes into a param group: how long it holds."""

import copy
import pickle

import pytest
import torch
from pair import Pair, give_gradients, make_params

from sgdr_fused import CosineWarmRestarts, FusedSGDR

OPTIONS = {"lr": 0.1, "T_0": 5}
SCHEDULE = CosineWarmRestarts(**OPTIONS)


def make(backend, **options):
    """An optimizer of one parameter of zero whose gradient is 1: each step moves it by the LR."""
    param = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGDR([param], backend=backend, **OPTIONS | options)
    return optimizer, optimizer.param_groups[0], param


def moved(optimizer, param):
    before = param.item()
    optimizer.step()
    return pytest.approx(before - param.item(), rel=1e-12)


def skip(optimizer):
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf


def test_lr_set_by_hand_holds_for_one_step(backend):
    optimizer, group, param = make(backend)
    optimizer.step()
    group["lr"] = 0.5
    assert moved(optimizer, param) == 0.5
    assert moved(optimizer, param) == SCHEDULE.lr_at(2)


@pytest.mark.parametrize(
    "edit",
    [
        {"weight_decay": 1e-9},
        {"eta_min": 0.01},
        {"initial_lr": 0.3},
        {"T_0": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("edit_first", [False, True], ids=["lr_first", "lr_last"])
def test_lr_set_by_hand_outlives_a_skipped_step_and_other_edits(backend, edit, edit_first):
    optimizer, group, param = make(backend)
    optimizer.step()
    group.update(edit | {"lr": 0.5} if edit_first else {"lr": 0.5} | edit)
    skip(optimizer)
    group["dampening"] = 0.0
    skip(optimizer)
    group["weight_decay"] = 1e-12
    assert moved(optimizer, param) == 0.5


def test_same_number_object_set_again_is_set_by_hand_again(backend):
    """It was judged by identity with the last LR seen."""
    optimizer, group, param = make(backend)
    by_hand = 0.5
    for _ in range(3):
        group["lr"] = by_hand
        skip(optimizer)
        group["lr"] = by_hand
        group["weight_decay"] = 0.0
        assert moved(optimizer, param) == 0.5
    assert moved(optimizer, param) == SCHEDULE.lr_at(3)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    ],
    ids=["deepcopy", "pickle"],
)
def test_lr_set_by_hand_is_copied(backend, copied):
    optimizer, group, _ = make(backend)
    group["lr"] = 0.5
    clone = copied(optimizer)
    (param,) = clone.param_groups[0]["params"]
    clone.param_groups[0]["eta_min"] = 0.01
    param.grad = torch.ones_like(param)
    assert moved(clone, param) == 0.5


def test_lr_set_by_hand_is_saved_and_loaded(backend):
    optimizer, group, _ = make(backend)
    optimizer.step()
    group["lr"] = 0.5
    resumed, own, param = make(backend)
    resumed.load_state_dict(optimizer.state_dict())
    own = resumed.param_groups[0]
    own["eta_min"] = 0.01
    assert moved(resumed, param) == 0.5
    assert moved(resumed, param) == CosineWarmRestarts(**OPTIONS, eta_min=0.01).lr_at(2)


def test_loaded_lr_of_the_schedule_follows_an_edit(backend):
    """It was taken for one set by hand."""
    optimizer, _, _ = make(backend)
    optimizer.step()
    resumed, _, param = make(backend)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["initial_lr"] = 0.3
    assert moved(resumed, param) == CosineWarmRestarts(lr=0.3, T_0=5).lr_at(1)


def test_state_dict_without_a_scheduled_lr_is_loaded(backend):
    """Version 0.1.0 saved none."""
    optimizer, _, _ = make(backend)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["scheduled_lr"]
    resumed, _, param = make(backend)
    resumed.load_state_dict(saved)
    assert moved(resumed, param) == SCHEDULE.lr_at(1)


@pytest.mark.parametrize(
    "jump", [lambda o: o.seek(7), lambda o: o.restart()], ids=["seek", "restart"]
)
def test_seek_and_restart_end_an_lr_set_by_hand(backend, jump):
    optimizer, group, param = make(backend)
    group["lr"] = 0.5
    jump(optimizer)
    assert moved(optimizer, param) == (SCHEDULE.lr_at(7) if group["step"] == 8 else 0.1)


# ----------------------------------------------------------------------------------- anneal="epoch"


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_lr_set_by_hand_holds_for_the_epoch_as_with_the_pair(backend, momentum):
    """It held for one step, where the pair's holds until the next scheduler.step()."""
    steps_per_epoch, options = 4, {"lr": 0.1, "T_0": 3, "momentum": momentum}
    ours, theirs = make_params([5, 33]), make_params([5, 33])
    optimizer = FusedSGDR(
        ours, steps_per_epoch=steps_per_epoch, anneal="epoch", backend=backend, **options
    )
    pair = Pair(theirs, **options)
    by_hand = {2: 0.5, 3: 0.25, 9: 0.7, 12: 0.3, 15: 0.2}
    for step in range(24):
        give_gradients(step, ours)
        give_gradients(step, theirs)
        if step in by_hand:
            optimizer.param_groups[0]["lr"] = pair.sgd.param_groups[0]["lr"] = by_hand[step]
        optimizer.step()
        pair.sgd.step()
        if step % steps_per_epoch == steps_per_epoch - 1:
            pair.scheduler.step()
        assert optimizer.get_last_lr() == [pair.sgd.param_groups[0]["lr"]]
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def test_lr_set_by_hand_in_the_warm_up_holds_for_one_step(backend):
    optimizer, group, param = make(
        backend, steps_per_epoch=4, anneal="epoch", warmup_steps=6, warmup_start_lr=0.01
    )
    optimizer.step()
    group["lr"] = 0.5
    assert moved(optimizer, param) == 0.5
    assert moved(optimizer, param) == CosineWarmRestarts(
        lr=0.1, T_0=5, warmup_steps=6, warmup_start_lr=0.01
    ).lr_at(2)
