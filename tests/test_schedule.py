"""The closed form, both backends, torch and exact integers agree on the schedule."""

import importlib
import importlib.util
import math
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from cases import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import sgdr_fused
from sgdr_fused import CosineWarmRestarts, FusedSGDR, Position, fit_T_0, native

RATE = st.floats(0, 10, allow_subnormal=False)

SCHEDULES = st.builds(
    lambda lr, share, **options: CosineWarmRestarts(lr=lr, eta_min=lr * share, **options),
    lr=RATE,
    share=st.floats(0, 1),
    T_0=st.integers(1, 12),
    T_mult=st.one_of(st.integers(1, 4), st.floats(1, 4)),
    steps_per_epoch=st.integers(1, 5),
    anneal=st.sampled_from(["step", "epoch"]),
    warmup_steps=st.integers(0, 15),
    warmup_start_lr=RATE,
    cycle_decay=st.floats(0, 1, allow_subnormal=False),
    n_cycles=st.one_of(st.none(), st.integers(1, 6)),
)


def running(schedule, backend):
    """An optimizer that follows a schedule, on a parameter that never has a gradient."""
    options = {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}
    return FusedSGDR([torch.nn.Parameter(torch.zeros(1))], backend=backend, **options)


def position_of(group):
    return Position(*(group[name] for name in Position._fields))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(schedule=SCHEDULES)
def test_running_optimizer_follows_the_closed_form(backend, schedule):
    optimizer = running(schedule, backend)
    group = optimizer.param_groups[0]
    for step in range(100):
        assert position_of(group) == schedule.position(step)
        assert group["lr"] == schedule.lr_at(step), step
        optimizer.step()


@settings(max_examples=150, deadline=None)
@given(schedule=SCHEDULES)
def test_plain_python_advances_as_its_closed_form(schedule):
    position = schedule.position(0)
    for step in range(1, 150):
        position = schedule.advance(position)
        assert position == schedule.position(step)


@settings(max_examples=100, deadline=None)
@given(schedule=SCHEDULES, start=st.integers(0, 10**6))
def test_seek_to_any_step_follows_the_closed_form(schedule, start):
    if native.extension is None:
        pytest.skip(native.why_missing)
    optimizer = running(schedule, "native")
    optimizer.seek(start)
    for step in range(start, start + 20):
        assert position_of(optimizer.param_groups[0]) == schedule.position(step)
        assert optimizer.get_last_lr() == [schedule.lr_at(step)]
        optimizer.step()


@settings(max_examples=100, deadline=None)
@given(schedule=SCHEDULES, total=st.integers(0, 300))
def test_restarts_lists_the_first_steps_of_cycles(schedule, total):
    positions = [schedule.position(step) for step in range(total)]
    starts = [p.step for p in positions if p.T_cur == 0 and 0 < p.cycle != schedule.n_cycles]
    assert schedule.restarts(total) == starts


@settings(max_examples=100, deadline=None)
@given(schedule=SCHEDULES)
def test_every_lr_is_between_eta_min_and_its_cycles_peak(schedule):
    for step in range(100):
        position = schedule.position(step)
        if position.T_cur < 0:
            low, high = sorted((schedule.lr, schedule.warmup_start_lr))
        else:
            low = schedule.eta_min
            high = low + (schedule.lr - low) * schedule.cycle_decay**position.cycle
        # Each sum and product rounds once; the i-th power has up to i roundings.
        slack = (4 + position.cycle) * 2**-52 * high
        assert low - slack <= schedule.lr_at(step) <= high + slack


# ----------------------------------------------------------------------------------------- torch's

# Each length and factor with a floor and without.
TORCH_SCHEDULES = [
    (T_0, T_mult, 1e-3 if (T_0 + T_mult) % 2 else 0.0)
    for T_0 in (1, 2, 3, 7, 10)
    for T_mult in (1, 2, 3, 5, 9, 10)
]


def torch_scheduler(lr, T_0, T_mult, eta_min):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    sgd.step()  # or the scheduler warns
    return CosineAnnealingWarmRestarts(sgd, T_0=T_0, T_mult=T_mult, eta_min=eta_min)


@pytest.mark.parametrize(("T_0", "T_mult", "eta_min"), TORCH_SCHEDULES)
def test_each_step_equals_torch_bit_for_bit(T_0, T_mult, eta_min):
    scheduler = torch_scheduler(0.3, T_0, T_mult, eta_min)
    schedule = CosineWarmRestarts(lr=0.3, T_0=T_0, T_mult=T_mult, eta_min=eta_min)
    for step in range(600):
        assert schedule.lr_at(step) == scheduler.get_last_lr()[0], step
        position = schedule.position(step)
        assert (position.T_cur, position.T_i) == (scheduler.T_cur, scheduler.T_i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()


def exact_position(T_0, T_mult, epoch):
    """T_cur and T_i, computed in integers."""
    T_i = T_0
    while epoch >= T_i:
        epoch -= T_i
        T_i *= T_mult
    return epoch, T_i


def points_torch_gets_wrong(T_0, T_mult, epochs):
    scheduler = torch_scheduler(1.0, T_0, T_mult, 0.0)
    wrong = []
    for epoch in range(epochs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step(epoch)
        if (scheduler.T_cur, scheduler.T_i) != exact_position(T_0, T_mult, epoch):
            wrong.append(epoch)
    return wrong


@pytest.mark.parametrize("T_0", [1, 2, 3, 10])
@pytest.mark.parametrize("T_mult", [1, 2, 3, 5, 9, 10])
def test_position_equals_torch_wherever_torch_is_right(T_0, T_mult):
    schedule = CosineWarmRestarts(lr=1.0, T_0=T_0, T_mult=T_mult)
    scheduler = torch_scheduler(1.0, T_0, T_mult, 0.0)
    compared = 0
    for epoch in range(1500):
        exact = exact_position(T_0, T_mult, epoch)
        assert schedule.position(epoch)[2:] == exact
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step(epoch)
        if (scheduler.T_cur, scheduler.T_i) == exact:
            assert schedule.lr_at(epoch) == scheduler.get_last_lr()[0]
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("T_0", "T_mult", "wrong"),
    [
        (1, 2, []),
        (1, 3, [121]),
        (2, 3, [242]),
        (10, 3, [1210]),
        (1, 9, [7381]),
        (1, 10, [111]),
        (2, 10, [222]),
        (3, 10, [333]),
    ],
)
def test_restarts_that_torch_begins_late_are_on_time(T_0, T_mult, wrong):
    """All restarts below 8000 that torch's scheduler.step(epoch) begins one epoch late."""
    assert points_torch_gets_wrong(T_0, T_mult, 8000) == wrong, "torch has mended this: say so"
    schedule = CosineWarmRestarts(lr=1.0, T_0=T_0, T_mult=T_mult)
    for epoch in wrong:
        assert schedule.position(epoch)[2:] == exact_position(T_0, T_mult, epoch)
        assert schedule.lr_at(epoch) == 1.0


@pytest.mark.parametrize("T_mult", [2, 3, 7, 9, 10])
@pytest.mark.parametrize("cycle", [1, 5, 10, 15])
def test_restarts_of_huge_steps_are_exact(T_mult, cycle):
    schedule = CosineWarmRestarts(lr=1.0, T_0=1, T_mult=T_mult)
    start = (T_mult**cycle - 1) // (T_mult - 1)
    assert schedule.position(start) == (start, cycle, 0, T_mult**cycle)
    assert schedule.position(start - 1)[1] == cycle - 1
    assert schedule.lr_at(start) == 1.0


def test_position_of_a_huge_step_is_computed_at_once():
    schedule = CosineWarmRestarts(lr=1.0, T_0=7, n_cycles=10**17)
    assert schedule.position(7 * 10**15 + 3) == (7 * 10**15 + 3, 10**15, 3, 7)
    assert schedule.position(7 * 10**17 + 3)[1] == 10**17
    assert schedule.lr_at(7 * 10**17 + 3) == 0.0


@pytest.mark.parametrize("T_mult", [2, 1.5, 1e300])
def test_length_of_a_huge_cycle_does_not_overflow(T_mult):
    schedule = CosineWarmRestarts(lr=1.0, T_0=5, T_mult=T_mult)
    assert schedule.cycle_length(5000) == 2**53
    assert schedule.position(10**15).cycle < 5000


def test_epoch_annealing_keeps_the_lr_of_an_epoch():
    schedule = CosineWarmRestarts(lr=0.3, T_0=5, T_mult=2, steps_per_epoch=4, anneal="epoch")
    scheduler = torch_scheduler(0.3, 5, 2, 0.0)
    for epoch in range(100):
        lrs = {schedule.lr_at(4 * epoch + i) for i in range(4)}
        assert lrs == {scheduler.get_last_lr()[0]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()


def test_steps_within_an_epoch_equal_torchs_fractions_of_an_epoch():
    """scheduler.step(epoch + i / n), to the rounding of that fraction."""
    schedule = CosineWarmRestarts(lr=1.0, T_0=3, T_mult=2, steps_per_epoch=8)
    scheduler = torch_scheduler(1.0, 3, 2, 0.0)
    for step in range(200):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step(step / 8)  # eighths are exact
        assert schedule.lr_at(step) == pytest.approx(scheduler.get_last_lr()[0], abs=2**-50)


def test_warm_up_is_linear_and_ends_at_the_peak():
    schedule = CosineWarmRestarts(lr=0.5, T_0=4, warmup_steps=4, warmup_start_lr=0.1)
    assert [schedule.lr_at(s) for s in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert schedule.lr_at(4) == 0.5
    assert schedule.position(0) == (0, 0, -4, 4)
    assert schedule.restarts(20) == [8, 12, 16]


def test_cycle_decay_shrinks_peaks_towards_eta_min():
    schedule = CosineWarmRestarts(lr=0.9, T_0=2, eta_min=0.1, cycle_decay=0.5)
    assert [schedule.lr_at(2 * i) for i in range(4)] == pytest.approx([0.9, 0.5, 0.3, 0.2])


def test_schedule_stays_at_eta_min_after_its_last_cycle():
    schedule = CosineWarmRestarts(lr=0.9, T_0=3, T_mult=2, eta_min=0.125, n_cycles=2)
    assert schedule.lr_at(8) > 0.125
    assert {schedule.lr_at(step) for step in (9, 10, 100, 10**9)} == {0.125}


def test_cycle_lengths_of_a_real_T_mult_are_rounded():
    schedule = CosineWarmRestarts(lr=1.0, T_0=10, T_mult=1.5)
    assert [schedule.cycle_length(i) for i in range(5)] == [10, 15, 22, 34, 51]


# -------------------------------------------------------------------------------------- many cycles

# From one cycle that never grows, over growth that is lost in rounding, to few cycles.
GROWTHS = [1, 1 + 2**-52, 1.0000001, 1.0001, 1.01, 1.5, 2, 1e300]


@pytest.fixture
def count_powers(monkeypatch):
    """Counts the powers of T_mult that the closed form computes; one is needed for each length."""
    calls = []
    power = sgdr_fused.schedule._power

    def counted(base, exponent):
        calls.append(exponent)
        assert len(calls) <= 25_000, "the time grows with the number of cycles"
        return power(base, exponent)

    monkeypatch.setattr(sgdr_fused.schedule, "_power", counted)
    return calls


@pytest.mark.parametrize("T_mult", GROWTHS)
@pytest.mark.parametrize("step", [10**6, 2**40, 2**61 - 1])
def test_seek_to_a_huge_step_does_not_walk_over_cycles(T_mult, step, backend, count_powers):
    """seek(10**6) took 9.6 s with a T_mult close to 1, and seek(2**40) did not end."""
    optimizer = running(CosineWarmRestarts(lr=1.0, T_0=1, T_mult=T_mult), backend)
    optimizer.seek(step)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5})
    group, added = optimizer.param_groups
    assert group["step"] == step
    assert 0 <= group["T_cur"] < group["T_i"]
    assert position_of(added) == position_of(group)
    count_powers.clear()
    CosineWarmRestarts(lr=1.0, T_0=1, T_mult=T_mult).lr_at(step - 1)
    assert len(count_powers) < 10, "once the starts are known, a look-up is enough"


@pytest.mark.parametrize("T_mult", [1 + 2**-52, 1.0001, 1.0003])
def test_position_is_the_sum_of_all_cycles_before_it(T_mult):
    schedule = CosineWarmRestarts(lr=1.0, T_0=1, T_mult=T_mult, warmup_steps=3)
    position = schedule.position(0)
    for step in range(1, 30_000):
        position = schedule.advance(position)
        assert position == schedule.position(step)
    assert position.cycle > 3000


@pytest.mark.parametrize("T_mult", [1.0001, 1.0003])
@pytest.mark.parametrize("cycle", [9999, 10_000, 10_001])
def test_both_backends_stop_growing_cycles_at_the_same_one(backend, T_mult, cycle):
    """Cycle 10,000 is the last that is longer than the one before."""
    schedule = CosineWarmRestarts(lr=1.0, T_0=10**6, T_mult=T_mult)
    assert schedule.cycle_length(9999) < schedule.cycle_length(10_000)
    assert schedule.cycle_length(10_000) == schedule.cycle_length(10**15)
    optimizer = running(schedule, backend)
    start = schedule.cycle_start(cycle)
    optimizer.seek(start - 2)
    for step in range(start - 2, start + 3):
        assert position_of(optimizer.param_groups[0]) == schedule.position(step)
        assert optimizer.get_last_lr() == [schedule.lr_at(step)]
        optimizer.step()


@settings(max_examples=100, deadline=None)
@given(schedule=SCHEDULES, cycle=st.integers(0, 250))  # later ones may start after step 2**61
def test_cycle_start_is_where_the_cycle_begins(schedule, cycle):
    start = schedule.cycle_start(cycle)
    assert start == schedule.warmup_steps + sum(map(schedule.cycle_length, range(cycle)))
    if not schedule.is_over(cycle):
        assert schedule.position(start) == (start, cycle, 0, schedule.cycle_length(cycle))


def test_restarts_lists_no_more_than_a_million():
    schedule = CosineWarmRestarts(lr=1.0, T_0=1)
    assert len(schedule.restarts(1000)) == 999
    with pytest.raises(ValueError, match=r"total_steps=3000000 has 2999999 restarts.*cycle_start"):
        schedule.restarts(3 * 10**6)


@pytest.mark.parametrize(
    ("total_steps", "n_cycles", "T_mult", "T_0"),
    [(10**15, 10**9, 1, 10**6), (2**53, 10**9, 1.0000001, 8998196), (10**9, 3, 2, 142857142)],
)
def test_fit_T_0_does_not_walk_over_cycles(total_steps, n_cycles, T_mult, T_0, count_powers):
    assert fit_T_0(total_steps, n_cycles, T_mult) == T_0
    assert len(count_powers) <= 10_001
    fitted = CosineWarmRestarts(lr=1.0, T_0=T_0, T_mult=T_mult)
    assert fitted.cycle_start(n_cycles) <= total_steps


# ------------------------------------------------------------------------------------------ budgets


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 5000),
    n_cycles=st.integers(1, 6),
    T_mult=st.one_of(st.integers(1, 3), st.floats(1, 3)),
)
def test_fit_T_0_is_the_longest_first_cycle_that_fits(total, n_cycles, T_mult):
    def needed(T_0):
        schedule = CosineWarmRestarts(lr=1.0, T_0=T_0, T_mult=T_mult)
        return sum(schedule.cycle_length(i) for i in range(n_cycles))

    if needed(1) > total:
        with pytest.raises(ValueError, match=f"total_steps={total} is too short"):
            fit_T_0(total, n_cycles, T_mult)
        return
    T_0 = fit_T_0(total, n_cycles, T_mult)
    assert needed(T_0) <= total < needed(T_0 + 1)


def test_fit_T_0_of_the_example():
    assert fit_T_0(total_steps=90, n_cycles=3, T_mult=2) == 12


@pytest.mark.parametrize("n_cycles", [0, -1, 2.5, True])
def test_fit_T_0_refuses_a_bad_number_of_cycles(n_cycles):
    with pytest.raises(ValueError, match=f"n_cycles value: {n_cycles!r}"):
        fit_T_0(10, n_cycles)


@pytest.mark.parametrize("step", [-1, 0.5, "1", None, True])
def test_position_refuses_what_is_no_step(step):
    with pytest.raises(ValueError, match="Invalid step value"):
        CosineWarmRestarts(lr=1.0, T_0=3).position(step)


def test_schedule_is_immutable_and_hashable():
    schedule = CosineWarmRestarts(lr=1.0, T_0=3)
    with pytest.raises(AttributeError):
        schedule.T_0 = 4
    assert schedule == CosineWarmRestarts(lr=1.0, T_0=3, T_mult=1)
    assert len({schedule, CosineWarmRestarts(lr=1.0, T_0=3)}) == 1


# ------------------------------------------------------------------------------------------- others

# optax and timm work in their own order of operations, optax in float32.
FLOAT32_ROUNDINGS = 8 * 2**-24
FLOAT64_ROUNDINGS = 8 * 2**-53


@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_schedule_equals_optax(T_mult):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optax = pytest.importorskip("optax")
    schedule = CosineWarmRestarts(
        lr=0.5, T_0=10, T_mult=T_mult, warmup_steps=5, warmup_start_lr=0.1, cycle_decay=0.5
    )
    # sgdr_schedule warms up in each cycle; ours once, so later cycles have a warm-up of no steps.
    theirs = optax.sgdr_schedule(
        [
            {
                "init_value": 0.1 if i == 0 else 0.5 * 0.5**i,
                "peak_value": 0.5 * 0.5**i,
                "warmup_steps": 5 if i == 0 else 0,
                "decay_steps": schedule.cycle_length(i) + (5 if i == 0 else 0),
                "end_value": 0.0,
            }
            for i in range(4)
        ]
    )
    for step in range(5 + sum(schedule.cycle_length(i) for i in range(4))):
        assert schedule.lr_at(step) == pytest.approx(float(theirs(step)), abs=FLOAT32_ROUNDINGS)


def timm_module(name):
    """Imports a module of timm.scheduler without timm itself, which needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("could not import 'timm'")
    package = types.ModuleType("timm_scheduler")
    package.__path__ = [str(Path(spec.origin).parent / "scheduler")]
    sys.modules["timm_scheduler"] = package
    return importlib.import_module(f"timm_scheduler.{name}")


def test_schedule_equals_timm():
    scheduler = timm_module("cosine_lr")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = scheduler.CosineLRScheduler(
        sgd,
        t_initial=10,
        lr_min=0.01,
        cycle_mul=2.0,
        cycle_decay=0.5,
        cycle_limit=3,
        warmup_t=5,
        warmup_lr_init=0.1,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    ours = CosineWarmRestarts(
        lr=0.5, T_0=10, T_mult=2, eta_min=0.01, warmup_steps=5, warmup_start_lr=0.1, n_cycles=3
    )
    # timm's peaks shrink as lr * decay ** i, ours in their distance from the floor.
    for step in range(5 + 10):
        theirs.step_update(step)
        assert ours.lr_at(step) == pytest.approx(sgd.param_groups[0]["lr"], abs=FLOAT64_ROUNDINGS)
    for step in (15 + 20 + 40, 100, 1000):
        theirs.step_update(step)
        assert ours.lr_at(step) == sgd.param_groups[0]["lr"] == 0.01


def test_formula_equals_the_paper():
    """Equation 5, for the figures that the paper's own experiments use."""
    schedule = CosineWarmRestarts(lr=0.05, T_0=1, T_mult=2, steps_per_epoch=391)
    step = 391 * (1 + 2) + 391 + 17  # in the third cycle, of 4 epochs
    expected = 0.5 * 0.05 * (1 + math.cos((391 + 17) / (4 * 391) * math.pi))
    assert schedule.lr_at(step) == pytest.approx(expected, rel=FLOAT64_ROUNDINGS, abs=0)
    assert schedule.restarts(391 * 16) == [391, 391 * 3, 391 * 7, 391 * 15]
