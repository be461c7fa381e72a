"""from_pair() and to_pair(): a running training moves to FusedSGDR and back, bit for bit."""

import warnings

import pytest
import torch
from pair import Pair, assert_same, copies_of, give_gradients, make_params, momentum_of
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    SequentialLR,
    StepLR,
)

from sgdr_fused import FusedSGDR

STEPS_AFTER = 60

OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "eta_min": 1e-3}


def groups_of(params):
    return [
        {"params": params[:2]},
        {"params": params[2:], "lr": 0.3, "momentum": 0.5, "nesterov": False, "maximize": True},
    ]


def make_pair(T_0, T_mult):
    params = make_params([33, 8, 5])
    return Pair(groups_of(params), T_0=T_0, T_mult=T_mult, **OPTIONS), params


def make_optimizer(backend, **options):
    params = make_params([33, 8, 5])
    return FusedSGDR(groups_of(params), backend=backend, **OPTIONS | options), params


def run(optimizer, params, start, stop):
    for step in range(start, stop):
        give_gradients(step, params)
        optimizer.step()


def pair_of(sgd, scheduler):
    """A Pair around the two that to_pair() returns."""
    pair = object.__new__(Pair)
    pair.sgd, pair.scheduler = sgd, scheduler
    return pair


def momentum_apart(optimizer):
    """Copies an optimizer's momentum buffers, so that both sides can continue."""
    for of_param in optimizer.state.values():
        if of_param.get("momentum_buffer") is not None:
            of_param["momentum_buffer"] = of_param["momentum_buffer"].clone()


def on_copies(optimizer, params):
    """Moves an optimizer to copies of its parameters and buffers."""
    copies = copies_of(params)
    to_copy = dict(zip(params, copies, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [to_copy[p] for p in group["params"]]
    state = {to_copy[p]: dict(of_param) for p, of_param in optimizer.state.items()}
    optimizer.state.clear()
    optimizer.state.update(state)
    momentum_apart(optimizer)
    return copies


def assert_goes_on_as(pair, theirs, optimizer, taken_after):
    """Steps both on from there, and compares after each step."""
    ours = on_copies(optimizer, theirs)
    for step in range(taken_after, taken_after + STEPS_AFTER):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


# T_0, T_mult, and the step of the hand-over: at the start, within a cycle, before its last step,
# at a restart and after it, and far along.
HAND_OVERS = [
    *((7, 1, step) for step in (0, 6, 7, 8, 50)),
    *((3, 2, step) for step in (1, 2, 3, 8, 21)),
    *((1, 3, step) for step in (0, 1, 3, 4)),
    *((1, 1, step) for step in (0, 1, 50)),
]


@pytest.mark.parametrize(("T_0", "T_mult", "taken_after"), HAND_OVERS)
def test_training_continues_exactly_after_from_pair(backend, T_0, T_mult, taken_after):
    pair, theirs = make_pair(T_0, T_mult)
    run(pair, theirs, 0, taken_after)
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, backend=backend)
    assert optimizer.param_groups[0]["step"] == taken_after
    assert optimizer.backend == backend
    assert_goes_on_as(pair, theirs, optimizer, taken_after)


@pytest.mark.parametrize(("T_0", "T_mult", "taken_after"), HAND_OVERS)
def test_training_continues_exactly_after_to_pair(backend, T_0, T_mult, taken_after):
    optimizer, ours = make_optimizer(backend, T_0=T_0, T_mult=T_mult)
    run(optimizer, ours, 0, taken_after)
    pair = pair_of(*optimizer.to_pair())
    assert type(pair.sgd) is torch.optim.SGD
    theirs = on_copies(pair.sgd, ours)
    for step in range(taken_after, taken_after + STEPS_AFTER):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


@pytest.mark.parametrize("taken_after", [0, 5, 12])
def test_to_pair_and_from_pair_round_trip(backend, taken_after):
    optimizer, ours = make_optimizer(backend, T_0=3, T_mult=2)
    expected, theirs = make_optimizer(backend, T_0=3, T_mult=2)
    run(optimizer, ours, 0, taken_after)
    run(expected, theirs, 0, taken_after)
    optimizer = FusedSGDR.from_pair(*optimizer.to_pair(), backend=backend)
    assert optimizer.param_groups == [
        group | {"params": own["params"]}
        for group, own in zip(expected.param_groups, optimizer.param_groups, strict=True)
    ]
    run(optimizer, ours, taken_after, taken_after + 30)
    run(expected, theirs, taken_after, taken_after + 30)
    assert_same(optimizer, ours, expected, theirs)


@pytest.mark.parametrize("taken_after_epochs", [0, 1, 3, 4, 10])
def test_from_pair_with_a_scheduler_stepped_once_an_epoch(backend, taken_after_epochs):
    """The scheduler is stepped every 5 optimizer steps; the LR is constant within an epoch."""
    pair, theirs = make_pair(3, 2)

    def epoch_of_pair(epoch):
        for step in range(5 * epoch, 5 * epoch + 5):
            give_gradients(step, theirs)
            pair.sgd.step()
        pair.scheduler.step()

    for epoch in range(taken_after_epochs):
        epoch_of_pair(epoch)
    optimizer = FusedSGDR.from_pair(
        pair.sgd, pair.scheduler, steps_per_epoch=5, anneal="epoch", backend=backend
    )
    assert optimizer.param_groups[0]["step"] == 5 * taken_after_epochs
    ours = on_copies(optimizer, theirs)
    for epoch in range(taken_after_epochs, taken_after_epochs + STEPS_AFTER // 5):
        epoch_of_pair(epoch)
        run(optimizer, ours, 5 * epoch, 5 * epoch + 5)
        assert_same(optimizer, ours, pair, theirs, f"after epoch {epoch}")


@pytest.mark.parametrize("steps", [0, 5, 15, 17, 45])
def test_to_pair_with_a_scheduler_stepped_once_an_epoch(backend, steps):
    """Also within an epoch: the scheduler's next step is at the end of the epoch."""
    optimizer, ours = make_optimizer(backend, T_0=3, T_mult=2, steps_per_epoch=5, anneal="epoch")
    run(optimizer, ours, 0, steps)
    pair = pair_of(*optimizer.to_pair())
    theirs = on_copies(pair.sgd, ours)
    for step in range(steps, steps + STEPS_AFTER):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.sgd.step()
        if (step + 1) % 5 == 0:
            pair.scheduler.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_from_pair_with_a_scheduler_stepped_by_fractions_of_an_epoch(backend):
    """scheduler.step(epoch + i / iters): eighths of an epoch are exact."""
    pair, theirs = make_pair(3, 2)
    for step in range(20):
        give_gradients(step, theirs)
        pair.sgd.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair.scheduler.step((step + 1) / 8)
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, steps_per_epoch=8, backend=backend)
    group = optimizer.param_groups[0]
    assert [group[n] for n in ("step", "cycle", "T_cur", "T_i")] == [20, 0, 20, 24]
    run(optimizer, theirs, 20, 26)
    assert [group[n] for n in ("step", "cycle", "T_cur", "T_i")] == [26, 1, 2, 48]


def test_to_pair_keeps_a_restart_and_an_lr_set_by_hand(backend):
    optimizer, ours = make_optimizer(backend, T_0=5, T_mult=2)
    run(optimizer, ours, 0, 3)
    optimizer.restart()
    run(optimizer, ours, 3, 6)
    optimizer.param_groups[0]["lr"] = 0.77
    pair = pair_of(*optimizer.to_pair())
    theirs = on_copies(pair.sgd, ours)
    for step in range(6, 60):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_from_pair_and_to_pair_copy_no_tensor(backend):
    pair, params = make_pair(3, 2)
    run(pair, params, 0, 2)
    buffers = [momentum_of(pair, p) for p in params]
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, backend=backend)
    assert all(momentum_of(optimizer, p) is b for p, b in zip(params, buffers, strict=True))
    sgd, _ = optimizer.to_pair()
    assert all(momentum_of(sgd, p) is b for p, b in zip(params, buffers, strict=True))
    assert sgd.param_groups[0]["params"][0] is params[0]


def test_from_pair_and_to_pair_change_nothing_in_their_source(backend):
    pair, params = make_pair(3, 2)
    run(pair, params, 0, 4)
    before = repr(pair.sgd.param_groups), pair.scheduler.state_dict()
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, backend=backend)
    assert (repr(pair.sgd.param_groups), pair.scheduler.state_dict()) == before
    before = repr(optimizer.param_groups)
    optimizer.to_pair()
    assert repr(optimizer.param_groups) == before


def test_from_pair_and_to_pair_keep_parameter_names(backend):
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    scheduler = CosineAnnealingWarmRestarts(sgd, T_0=3)
    optimizer = FusedSGDR.from_pair(sgd, scheduler, backend=backend)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    sgd, _ = optimizer.to_pair()
    assert sgd.param_groups[0]["param_names"] == ["weight", "bias"]


def test_from_pair_does_not_walk_over_the_cycles_of_a_long_training():
    class CountedInt(int):
        def __pow__(self, exponent):
            counted.append(exponent)
            return int(self) ** exponent

    counted = []
    pair, _ = make_pair(1, 1)
    pair.scheduler.load_state_dict({"last_epoch": 10**5, "T_mult": CountedInt(1)})
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler)
    assert [optimizer.param_groups[0][n] for n in ("step", "cycle", "T_cur")] == [10**5, 10**5, 0]
    assert len(counted) < 100


# --------------------------------------------------------------------------- warm-up, then the pair


def make_warmed_up_pair(total_iters=5, milestone=5, start_factor=0.1, end_factor=1.0):
    """torch's way to warm up: SequentialLR of LinearLR and the cosine, on two groups."""
    params = make_params([33, 8, 5])
    options = {name: value for name, value in OPTIONS.items() if name != "eta_min"}
    pair = object.__new__(Pair)
    pair.sgd = torch.optim.SGD(groups_of(params), foreach=False, fused=False, **options)
    pair.scheduler = SequentialLR(
        pair.sgd,
        [
            LinearLR(
                pair.sgd,
                start_factor=start_factor,
                end_factor=end_factor,
                total_iters=total_iters,
            ),
            CosineAnnealingWarmRestarts(pair.sgd, T_0=3, T_mult=2, eta_min=1e-3),
        ],
        milestones=[milestone],
    )
    return pair, params


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("taken_after", [5, 6, 7, 8, 13, 14, 50])
def test_from_pair_takes_a_warm_up_and_cosine_over_exactly(backend, taken_after):
    pair, theirs = make_warmed_up_pair()
    run(pair, theirs, 0, taken_after)
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, backend=backend)
    assert optimizer.param_groups[0]["step"] == taken_after
    assert optimizer.param_groups[0]["warmup_steps"] == 5
    assert_goes_on_as(pair, theirs, optimizer, taken_after)


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("taken_after", [0, 1, 4])
def test_from_pair_takes_over_within_the_warm_up(backend, taken_after):
    """LinearLR multiplies the LR of the step before, which rounds; the next LR is its very own."""
    pair, theirs = make_warmed_up_pair()
    run(pair, theirs, 0, taken_after)
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, backend=backend)
    assert optimizer.get_last_lr() == pair.scheduler.get_last_lr()
    for step in range(taken_after, 60):
        # Each step of LinearLR rounds a few times, of which there are 5.
        assert optimizer.get_last_lr() == pytest.approx(pair.scheduler.get_last_lr(), rel=1e-14)
        assert step < 5 or optimizer.get_last_lr() == pair.scheduler.get_last_lr()
        optimizer.step()
        pair.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_from_pair_with_a_warm_up_stepped_once_an_epoch(backend):
    """It rises at once after each epoch, ours at each step; after it the two are the same."""
    pair, theirs = make_warmed_up_pair()

    def epoch_of_pair(epoch):
        for step in range(4 * epoch, 4 * epoch + 4):
            give_gradients(step, theirs)
            pair.sgd.step()
        pair.scheduler.step()

    options = {"steps_per_epoch": 4, "anneal": "epoch", "backend": backend}
    for epoch in range(7):
        if epoch < 5:
            with pytest.raises(ValueError, match=rf"epoch {epoch} of a warm-up.*epoch 5 on"):
                FusedSGDR.from_pair(pair.sgd, pair.scheduler, **options)
        epoch_of_pair(epoch)
    optimizer = FusedSGDR.from_pair(pair.sgd, pair.scheduler, **options)
    assert optimizer.param_groups[0]["step"] == 4 * 7
    ours = on_copies(optimizer, theirs)
    for epoch in range(7, 7 + STEPS_AFTER // 4):
        epoch_of_pair(epoch)
        run(optimizer, ours, 4 * epoch, 4 * epoch + 4)
        assert_same(optimizer, ours, pair, theirs, f"after epoch {epoch}")


# ----------------------------------------------------------------------------------------- refusals


def sgd_of(params, **options):
    return torch.optim.SGD(params, lr=0.1, **options)


def test_from_pair_refuses_other_optimizers_than_sgd():
    adam = torch.optim.Adam(make_params([3]))
    with pytest.raises(TypeError, match="Adam"):
        FusedSGDR.from_pair(adam, CosineAnnealingWarmRestarts(adam, T_0=3))


def test_from_pair_refuses_other_schedulers():
    sgd = sgd_of(make_params([3]))
    with pytest.raises(TypeError, match="StepLR"):
        FusedSGDR.from_pair(sgd, StepLR(sgd, 3))


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_from_pair_refuses_another_sequence_of_schedulers():
    sgd = sgd_of(make_params([3]))
    sequence = SequentialLR(sgd, [LinearLR(sgd), ExponentialLR(sgd, 0.9)], milestones=[5])
    with pytest.raises(TypeError, match="LinearLR, ExponentialLR"):
        FusedSGDR.from_pair(sgd, sequence)


@pytest.mark.parametrize(
    "options", [{"total_iters": 4}, {"total_iters": 6}, {"milestone": 4}, {"end_factor": 0.5}]
)
def test_from_pair_refuses_a_warm_up_that_does_not_end_at_the_peak(options):
    pair, _ = make_warmed_up_pair(**options)
    with pytest.raises(ValueError, match=r"end_factor=.*total_iters=.*milestones="):
        FusedSGDR.from_pair(pair.sgd, pair.scheduler)


def test_from_pair_refuses_the_scheduler_of_another_optimizer():
    one, other = sgd_of(make_params([3])), sgd_of(make_params([3]))
    with pytest.raises(ValueError, match="another optimizer"):
        FusedSGDR.from_pair(one, CosineAnnealingWarmRestarts(other, T_0=3))


def test_from_pair_refuses_differentiable_sgd():
    sgd = sgd_of(make_params([3]), differentiable=True)
    with pytest.raises(ValueError, match="differentiable=True"):
        FusedSGDR.from_pair(sgd, CosineAnnealingWarmRestarts(sgd, T_0=3))


def test_from_pair_refuses_fractions_of_a_step():
    pair, _ = make_pair(3, 2)
    pair.sgd.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.scheduler.step(1.5)
    with pytest.raises(ValueError, match=r"T_cur=1\.5.*steps_per_epoch=1"):
        FusedSGDR.from_pair(pair.sgd, pair.scheduler)
    FusedSGDR.from_pair(pair.sgd, pair.scheduler, steps_per_epoch=2)


def test_from_pair_refuses_an_eta_min_above_a_groups_lr():
    sgd = sgd_of(make_params([3]))
    with pytest.raises(ValueError, match=r"eta_min=0\.5 is above lr=0\.1"):
        FusedSGDR.from_pair(sgd, CosineAnnealingWarmRestarts(sgd, T_0=3, eta_min=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle_decay": 0.5}, r"cycle_decay=0\.5"),
        ({"n_cycles": 4}, "n_cycles=4"),
        ({"reset_momentum": True}, "reset_momentum=True"),
        ({"decoupled_weight_decay": True}, "decoupled_weight_decay=True"),
        ({"T_mult": 1.5}, r"T_mult=1\.5"),
        ({"warmup_steps": 3}, "warm-up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_to_pair_refuses_options_that_the_pair_lacks(backend, options, message):
    optimizer, _ = make_optimizer(backend, T_0=5, **options)
    with pytest.raises(ValueError, match=rf"param_groups\[0\].*{message}"):
        optimizer.to_pair()


@pytest.mark.parametrize(
    ("name", "value"), [("T_0", 9), ("T_mult", 3), ("eta_min", 0.01), ("steps_per_epoch", 2)]
)
def test_to_pair_refuses_groups_with_different_schedules(backend, name, value):
    optimizer, _ = make_optimizer(backend, T_0=5)
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"param_groups\[1\] has {name}={value}"):
        optimizer.to_pair()


def test_to_pair_refuses_groups_restarted_separately(backend):
    optimizer, _ = make_optimizer(backend, T_0=5)
    optimizer.restart(group=1)
    with pytest.raises(ValueError, match=r"param_groups\[1\] has cycle=1"):
        optimizer.to_pair()


def test_to_pair_works_after_the_warm_up(backend):
    optimizer, ours = make_optimizer(backend, T_0=5, warmup_steps=3)
    run(optimizer, ours, 0, 4)
    pair = pair_of(*optimizer.to_pair())
    theirs = on_copies(pair.sgd, ours)
    for step in range(4, 40):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")
