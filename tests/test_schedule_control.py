"""restart(), seek() and queries of a running optimizer; each group has its own schedule."""

import copy
import math

import pytest
import torch
from pair import assert_same, copies_of, give_gradients, make_params, momentum_of

from sgdr_fused import CosineWarmRestarts, FusedSGDR


def make(backend, n_groups=1, **options):
    params = make_params([9] * n_groups)
    options = {"lr": 0.5, "momentum": 0.9, "T_0": 4, "T_mult": 2} | options
    return FusedSGDR([{"params": [p]} for p in params], backend=backend, **options), params


def run(optimizer, params, steps, start=0):
    lrs = []
    for step in range(start, start + steps):
        lrs.append(optimizer.get_last_lr())
        give_gradients(step, params)
        optimizer.step()
    return lrs


def place(optimizer, group=0):
    return [optimizer.param_groups[group][name] for name in ("step", "cycle", "T_cur", "T_i")]


def test_get_last_lr_is_the_lr_of_the_next_step(backend):
    """With p = 0 and a gradient of 1, the parameter moves by the LR."""
    param = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = FusedSGDR([param], lr=0.3, T_0=5, eta_min=0.01, backend=backend)
    for _ in range(12):
        (expected,) = optimizer.get_last_lr()
        assert optimizer.param_groups[0]["lr"] == expected
        param.data.zero_()
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert -param.item() == expected


def test_get_last_lr_is_a_list_of_floats_of_all_groups(backend):
    optimizer, params = make(backend, n_groups=3)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    assert optimizer.get_last_lr() == [0.5, 0.25, 0.5]
    run(optimizer, params, 2)
    assert all(type(lr) is float for lr in optimizer.get_last_lr())


def test_initial_lr_is_the_peak(backend):
    optimizer, params = make(backend)
    run(optimizer, params, 3)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


def test_tensor_lr_is_read_at_construction_only(backend):
    lr = torch.tensor(0.5)
    optimizer, params = make(backend, lr=lr)
    run(optimizer, params, 2)
    assert lr == 0.5
    assert optimizer.get_last_lr()[0] < 0.5


def test_restart_begins_the_next_cycle_at_its_peak(backend):
    optimizer, params = make(backend)
    run(optimizer, params, 3)
    optimizer.restart()
    assert place(optimizer) == [3, 1, 0, 8]
    assert optimizer.get_last_lr() == [0.5]
    assert run(optimizer, params, 9)[-1] == [0.5]
    assert place(optimizer) == [12, 2, 1, 16]


def test_restart_before_the_first_step_and_twice_in_a_row(backend):
    optimizer, params = make(backend)
    optimizer.restart()
    optimizer.restart()
    assert place(optimizer) == [0, 2, 0, 16]
    run(optimizer, params, 1)
    assert place(optimizer) == [1, 2, 1, 16]


def test_restart_of_one_group_leaves_the_others(backend):
    optimizer, params = make(backend, n_groups=3)
    run(optimizer, params, 2)
    optimizer.restart(group=1)
    assert [place(optimizer, i) for i in range(3)] == [[2, 0, 2, 4], [2, 1, 0, 8], [2, 0, 2, 4]]
    optimizer.restart(group=-1)
    assert place(optimizer, 2) == [2, 1, 0, 8]
    with pytest.raises(IndexError):
        optimizer.restart(group=3)


def test_restart_leaves_the_momentum(backend):
    optimizer, params = make(backend)
    run(optimizer, params, 2)
    kept = momentum_of(optimizer, params[0]).clone()
    optimizer.restart()
    assert torch.equal(momentum_of(optimizer, params[0]), kept)


@pytest.mark.parametrize("step", [0, 1, 3, 4, 11, 12, 13, 10**6, 10**15])
def test_seek_moves_every_group(backend, step):
    optimizer, params = make(backend, n_groups=2)
    optimizer.param_groups[1]["T_0"] = 3
    run(optimizer, params, 2)
    optimizer.seek(step)
    for i, group in enumerate(optimizer.param_groups):
        schedule = CosineWarmRestarts.of_group(group)
        assert tuple(place(optimizer, i)) == schedule.position(step)
        assert group["lr"] == schedule.lr_at(step)
    (expected, _), _ = run(optimizer, params, 2)
    assert expected == CosineWarmRestarts.of_group(optimizer.param_groups[0]).lr_at(step)
    assert place(optimizer)[0] == step + 2


def test_seek_forgets_earlier_restarts(backend):
    optimizer, params = make(backend)
    run(optimizer, params, 1)
    optimizer.restart()
    optimizer.seek(5)
    assert place(optimizer) == [5, 1, 1, 8]


def test_seek_leaves_parameters_and_momentum(backend):
    optimizer, params = make(backend)
    run(optimizer, params, 2)
    kept = params[0].detach().clone(), momentum_of(optimizer, params[0]).clone()
    optimizer.seek(100)
    assert torch.equal(params[0], kept[0])
    assert torch.equal(momentum_of(optimizer, params[0]), kept[1])


def test_cycle_and_is_cycle_end_follow_the_schedule(backend):
    optimizer, params = make(backend, T_0=2)
    seen = [(optimizer.cycle, optimizer.is_cycle_end)]
    for step in range(7):
        run(optimizer, params, 1, step)
        seen.append((optimizer.cycle, optimizer.is_cycle_end))
    ends = [(0, False), (0, False), (1, True), (1, False), (1, False), (1, False), (2, True)]
    assert seen == [*ends, (2, False)]


def test_is_cycle_end_is_true_once_at_the_end_of_the_last_cycle(backend):
    optimizer, params = make(backend, T_0=2, T_mult=1, n_cycles=2)
    ends = []
    for step in range(8):
        run(optimizer, params, 1, step)
        ends.append(optimizer.is_cycle_end)
    assert ends == [False, True, False, True, False, False, False, False]


def skip_by_amp(optimizer, params):
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def skip_nonfinite(optimizer, params):
    optimizer.skip_nonfinite = True
    params[0].grad = torch.full_like(params[0], float("nan"))
    optimizer.step()
    optimizer.skip_nonfinite = False


@pytest.fixture(params=[skip_by_amp, skip_nonfinite])
def skip(request):
    """Takes a step that is skipped."""
    return request.param


def test_is_cycle_end_is_true_once_a_cycle_though_steps_are_skipped(backend, skip):
    """A loop that keeps the weights ``if optimizer.is_cycle_end`` kept 5 for 3 cycles."""
    optimizer, params = make(backend, T_0=2, T_mult=1)
    kept = []
    for step in range(6):
        run(optimizer, params, 1, step)
        kept += [optimizer.cycle] if optimizer.is_cycle_end else []
        if step % 3 == 1:
            skip(optimizer, params)
            kept += [optimizer.cycle] if optimizer.is_cycle_end else []
    assert kept == [1, 2, 3]


def test_skipped_step_is_no_cycle_end_though_nobody_asked_before(backend, skip):
    optimizer, params = make(backend, T_0=2)
    run(optimizer, params, 2)
    skip(optimizer, params)
    assert not optimizer.is_cycle_end


@pytest.mark.parametrize("comes_there", ["restart", "seek", "load_state_dict", "deepcopy"])
def test_step_skipped_at_the_start_of_a_cycle_is_no_cycle_end(backend, skip, comes_there):
    optimizer, params = make(backend, T_0=2)
    if comes_there == "restart":
        optimizer.restart()
    else:
        other, _ = make(backend, T_0=2)
        (optimizer if comes_there == "seek" else other).seek(2)
        if comes_there == "load_state_dict":
            optimizer.load_state_dict(other.state_dict())
        elif comes_there == "deepcopy":
            optimizer = copy.deepcopy(other)
            params = optimizer.param_groups[0]["params"]
    assert optimizer.is_cycle_end
    skip(optimizer, params)
    assert not optimizer.is_cycle_end
    run(optimizer, params, optimizer.param_groups[0]["T_i"])
    assert optimizer.is_cycle_end


def test_begun_at_is_where_the_schedule_was_last_put(backend):
    optimizer, params = make(backend, T_0=2)
    run(optimizer, params, 3)
    optimizer.restart()
    assert optimizer.begun_at == (0, 0, 0, 2)
    saved = optimizer.state_dict()
    optimizer.seek(4)
    assert optimizer.begun_at == (4, 1, 2, 4)
    optimizer.load_state_dict(saved)
    assert optimizer.begun_at == (3, 2, 0, 8)


def test_is_cycle_end_is_false_at_the_end_of_the_warm_up(backend):
    optimizer, params = make(backend, warmup_steps=2)
    run(optimizer, params, 2)
    assert (optimizer.cycle, optimizer.is_cycle_end) == (0, False)
    assert optimizer.get_last_lr() == [0.5]


def test_n_cycles_lowered_below_the_current_cycle_ends_the_schedule(backend):
    optimizer, params = make(backend, T_0=2, T_mult=1, eta_min=0.01)
    run(optimizer, params, 9)
    optimizer.param_groups[0]["n_cycles"] = 3
    run(optimizer, params, 3)
    assert optimizer.get_last_lr() == [0.01]


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": 5, "warmup_start_lr": 0.01},
        {"cycle_decay": 0.5, "eta_min": 0.01},
        {"n_cycles": 2, "eta_min": 0.01},
        {"steps_per_epoch": 3, "T_0": 2},
        {"steps_per_epoch": 3, "T_0": 2, "anneal": "epoch"},
        {"T_mult": 1.5},
        {"T_0": 1, "T_mult": 1},
        {"T_0": 1, "T_mult": 3},
        {
            "warmup_steps": 3,
            "cycle_decay": 0.9,
            "n_cycles": 3,
            "steps_per_epoch": 2,
            "anneal": "epoch",
            "T_mult": 1.3,
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_every_step_uses_the_lr_of_the_closed_form(backend, options):
    optimizer, params = make(backend, **options)
    schedule = CosineWarmRestarts.of_group(optimizer.param_groups[0])
    assert [lr for (lr,) in run(optimizer, params, 50)] == [schedule.lr_at(s) for s in range(50)]


def test_each_group_has_its_own_schedule(backend):
    params = make_params([9, 5, 3])
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "T_0": 3, "T_mult": 1, "eta_min": 0.1, "lr": 0.3},
        {"params": params[2:], "warmup_steps": 4, "n_cycles": 1, "anneal": "epoch"},
    ]
    options = {"lr": 0.5, "momentum": 0.9, "T_0": 2, "T_mult": 2, "steps_per_epoch": 2}
    optimizer = FusedSGDR(groups, backend=backend, **options)
    schedules = [CosineWarmRestarts.of_group(group) for group in optimizer.param_groups]
    together = copies_of(params)
    alone = [
        FusedSGDR([group | {"params": [param]}], backend="reference", **options)
        for group, param in zip(groups, together, strict=True)
    ]
    for step in range(40):
        assert optimizer.get_last_lr() == [schedule.lr_at(step) for schedule in schedules]
        give_gradients(step, params, together)
        optimizer.step()
        for one in alone:
            one.step()
        for ours, theirs in zip(params, together, strict=True):
            assert torch.equal(ours, theirs), step


def test_reset_momentum_drops_the_momentum_at_each_restart(backend):
    """The result equals clearing the state by hand. The start and the end are no restarts."""
    options = {"T_0": 3, "T_mult": 1, "dampening": 0.5, "n_cycles": 3}
    optimizer, params = make(backend, reset_momentum=True, **options)
    expected, expected_params = make("reference", **options)
    for step in range(13):
        if step in (3, 6):
            assert momentum_of(optimizer, params[0]) is None
            expected.state.clear()
        run(optimizer, params, 1, step)
        run(expected, expected_params, 1, step)
        if step not in (2, 5):  # where ours has dropped it already
            assert_same(optimizer, params, expected, expected_params, f"after step {step}")


def test_restart_drops_the_momentum_with_reset_momentum(backend):
    optimizer, params = make(backend, n_groups=2)
    optimizer.param_groups[1]["reset_momentum"] = True
    run(optimizer, params, 2)
    optimizer.restart()
    assert momentum_of(optimizer, params[0]) is not None
    assert momentum_of(optimizer, params[1]) is None
    run(optimizer, params, 2)
    assert momentum_of(optimizer, params[1]) is not None


def test_reset_momentum_includes_parameters_without_a_gradient(backend):
    optimizer, params = make(backend, T_0=2, reset_momentum=True)
    run(optimizer, params, 1)
    params[0].grad = None
    optimizer.step()
    assert momentum_of(optimizer, params[0]) is None


def test_new_group_joins_at_the_current_step_after_a_restart(backend):
    """With equal cycles it joins group 0's position, else its own schedule's at that step."""
    optimizer, params = make(backend)
    run(optimizer, params, 2)
    optimizer.restart()
    run(optimizer, params, 1)
    alike, other = make_params([3, 3], seed=1)
    optimizer.add_param_group({"params": [alike], "lr": 0.1})
    optimizer.add_param_group({"params": [other], "T_0": 2})
    assert place(optimizer, 1) == place(optimizer, 0) == [3, 1, 1, 8]
    assert place(optimizer, 2) == [3, 1, 1, 4]


def test_schedule_advances_without_momentum_or_gradients(backend):
    optimizer, params = make(backend, momentum=0)
    for _ in range(5):
        optimizer.step()
    assert params[0].grad is None
    assert place(optimizer) == [5, 1, 1, 8]


def test_repr_shows_the_schedule(backend):
    optimizer, _ = make(backend)
    for text in ("FusedSGDR", "T_0: 4", "T_mult: 2", "initial_lr: 0.5", "cycle: 0"):
        assert text in repr(optimizer)


# The steps of an epoch of 10 batches, in groups of 3 or 4, by what becomes of the last batches.
STEPS_OF_EPOCH = {
    "flushed": lambda batches, accumulation: math.ceil(batches / accumulation),
    "dropped": lambda batches, accumulation: batches // accumulation,
}


@pytest.mark.parametrize("remainder", STEPS_OF_EPOCH)
@pytest.mark.parametrize("accumulation", [3, 4, 5])
def test_restart_after_whole_epochs_with_gradient_accumulation(backend, accumulation, remainder):
    """10 batches in groups of 3 flushed, with `//`: a restart after 7.5 epochs, not 10."""
    steps_per_epoch = STEPS_OF_EPOCH[remainder](10, accumulation)
    optimizer, _ = make(backend, T_0=10, T_mult=1, steps_per_epoch=steps_per_epoch)
    ends = []
    for epoch in range(30):
        for batch in range(1, 11):
            is_last = remainder == "flushed" and batch == 10
            if batch % accumulation == 0 or is_last:
                optimizer.step()
                if optimizer.is_cycle_end:
                    ends.append(epoch + batch / 10)
    last_step = 10 if remainder == "flushed" else 10 - 10 % accumulation
    assert ends == [epoch + last_step / 10 for epoch in (9, 19, 29)]


@pytest.mark.parametrize("epochs", [0, 2.5, 3, 10, 25.04])
@pytest.mark.parametrize("new", [50, 200, 7])
def test_resume_with_another_batch_size(backend, new, epochs):
    """As docs/faq.md says: from here on as if the training had had that size from the start."""
    options = {"T_0": 10, "T_mult": 2, "cycle_decay": 0.5}
    old, _ = make(backend, steps_per_epoch=100, warmup_steps=200, **options)
    old.seek(round(epochs * 100))
    resumed, params = make(backend, steps_per_epoch=new, **options)
    resumed.load_state_dict(old.state_dict())
    (group,) = resumed.param_groups
    assert group["step"] / group["steps_per_epoch"] == epochs
    group["warmup_steps"] = group["warmup_steps"] * new // group["steps_per_epoch"]
    group["steps_per_epoch"] = new
    resumed.seek(round(epochs * new))
    expected = CosineWarmRestarts(lr=0.5, steps_per_epoch=new, warmup_steps=2 * new, **options)
    start = round(epochs * new)
    assert run(resumed, params, 60) == [[expected.lr_at(start + i)] for i in range(60)]
