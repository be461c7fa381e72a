"""docs/migration.md: the code before and after does the same, and the tables are right."""

import math
import re
import warnings

import pages
import pytest
import torch

from sgdr_fused import CosineWarmRestarts, FusedSGDR, fit_T_0

PAGE = pages.DOCS / "migration.md"
SECTIONS = dict(re.findall(r"^##+ (.+)\n((?:(?!##).*\n)*)", PAGE.read_text(), re.M))
WITH_CODE = [name for name, text in SECTIONS.items() if "```python" in text]
FROM_TORCH, WITH_WARMUP, FROM_TIMM, FROM_KERAS, FROM_HUGGING_FACE, FROM_APEX = WITH_CODE

# Others compute in another order of operations; Keras in float32, where the cosine's argument is
# rounded too.
FLOAT64_ROUNDINGS = 16 * 2**-53
FLOAT32_ROUNDINGS = 32 * 2**-24


@pytest.fixture(autouse=True)
def _keras_on_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))


def import_or_skip(module):
    """Imports a module; its warnings are no errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, exc_type=ImportError)


def blocks_of(section, tmp_path):
    page = tmp_path / "section.md"
    page.write_text(SECTIONS[section])
    return [block for block in pages.blocks(page) if block.language == "python"]


def run(block):
    """Runs one block and returns its names."""
    for module in block.needs:
        import_or_skip(module)
    names = pages.prelude()
    exec(block.code(), names)
    return names


@pytest.fixture
def before_and_after(tmp_path):
    """Runs a section's two blocks, each with its own model and data; returns their names."""

    def before_and_after(section):
        before, after = blocks_of(section, tmp_path)
        return run(before), run(after)

    return before_and_after


def schedule_of(optimizer):
    return CosineWarmRestarts.of_group(optimizer.param_groups[0])


@pytest.mark.parametrize("section", WITH_CODE)
def test_code_after_the_change_runs(section, tmp_path):
    before, after = blocks_of(section, tmp_path)
    assert not after.needs
    optimizer = run(after)["optimizer"]
    assert isinstance(optimizer, FusedSGDR)
    optimizer.step()
    before.code()


def test_training_equals_the_pair_bit_for_bit(before_and_after):
    before, after = before_and_after(FROM_TORCH)
    for theirs, ours in zip(before["model"].parameters(), after["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert after["optimizer"].get_last_lr() == before["scheduler"].get_last_lr()
    assert after["optimizer"].cycle == 2


def test_warm_up_equals_sequential_lr(before_and_after):
    before, after = before_and_after(WITH_WARMUP)
    schedule = schedule_of(after["optimizer"])
    for step in range(100):
        theirs = before["optimizer"].param_groups[0]["lr"]
        assert schedule.lr_at(step) == pytest.approx(theirs, rel=1e-12, abs=FLOAT64_ROUNDINGS)
        before["optimizer"].step()
        before["scheduler"].step()


def test_lrs_equal_timm(before_and_after):
    before, after = before_and_after(FROM_TIMM)
    schedule = schedule_of(after["optimizer"])
    for step in range(120):
        before["scheduler"].step_update(step)
        theirs = before["optimizer"].param_groups[0]["lr"]
        assert schedule.lr_at(step) == pytest.approx(theirs, abs=FLOAT64_ROUNDINGS)
    assert schedule.lr_at(5 + 10) == pytest.approx(0.05)
    assert schedule.lr_at(119) == 0


@pytest.fixture
def timm_lrs():
    """The LRs of timm's scheduler with some options."""
    scheduler = import_or_skip("timm.scheduler")

    def timm_lrs(times, **options):
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        theirs = scheduler.CosineLRScheduler(sgd, **options)
        lrs = []
        for time in times:
            theirs.step(time)
            theirs.step_update(time)
            lrs.append(sgd.param_groups[0]["lr"])
        return lrs

    return timm_lrs


def test_lrs_equal_timm_that_counts_epochs(timm_lrs):
    schedule = CosineWarmRestarts(
        lr=0.1, T_0=5, T_mult=2, steps_per_epoch=7, anneal="epoch", warmup_steps=3 * 7
    )
    options = {"t_initial": 5, "cycle_mul": 2, "cycle_limit": 9, "warmup_t": 3}
    theirs = timm_lrs(range(50), warmup_prefix=True, **options)
    assert [schedule.lr_at(7 * epoch) for epoch in range(50)] == pytest.approx(
        theirs, abs=FLOAT64_ROUNDINGS
    )
    for epoch in (0, 1, 2, 3, 10):  # the ramp rises within an epoch, the cosine does not
        assert (schedule.lr_at(7 * epoch) != schedule.lr_at(7 * epoch + 6)) == (epoch < 3)


def test_timms_warm_up_cuts_into_the_first_cycle_unless_it_is_a_prefix(timm_lrs):
    options = {"t_initial": 10, "warmup_t": 4, "t_in_epochs": False}
    without_warm_up = CosineWarmRestarts(lr=0.1, T_0=10)
    assert timm_lrs([3, 4], **options) == pytest.approx([0.075, without_warm_up.lr_at(4)])
    assert timm_lrs([4], warmup_prefix=True, **options) == [0.1]


def test_timm_decays_the_peak_itself(timm_lrs):
    options = {"t_initial": 10, "cycle_limit": 9, "cycle_decay": 0.1, "lr_min": 0.01}
    assert timm_lrs([10, 20], t_in_epochs=False, **options) == pytest.approx([0.01, 0.001])
    schedule = CosineWarmRestarts(lr=0.1, T_0=10, cycle_decay=0.1, eta_min=0.01)
    assert schedule.lr_at(20) == pytest.approx(0.01 + 0.09 * 0.01)


def test_timms_restart_may_be_a_step_late(timm_lrs):
    options = {"t_initial": 1, "cycle_mul": 3, "cycle_limit": 9, "t_in_epochs": False}
    assert timm_lrs([121], **options) == pytest.approx([0.0])
    assert CosineWarmRestarts(lr=0.1, T_0=1, T_mult=3).lr_at(121) == 0.1


def keras_formula(step, initial_learning_rate, first_decay_steps, t_mul, m_mul, alpha):
    """Keras' formula by its documentation: a cosine over the cycle, from 1 to alpha."""
    cycle, left, length = 0, step, first_decay_steps
    while left >= length:
        cycle, left, length = cycle + 1, left - length, length * t_mul
    cosine = m_mul**cycle * (1 + math.cos(math.pi * left / length)) / 2
    return initial_learning_rate * ((1 - alpha) * cosine + alpha)


def test_lrs_equal_keras_formula(tmp_path):
    schedule = schedule_of(run(blocks_of(FROM_KERAS, tmp_path)[1])["optimizer"])
    for step in range(310):
        theirs = keras_formula(step, 0.1, 10, 2, 0.8, 0.01)
        assert schedule.lr_at(step) == pytest.approx(theirs, abs=FLOAT64_ROUNDINGS)


def test_lrs_equal_keras(before_and_after):
    before, after = before_and_after(FROM_KERAS)
    schedule = schedule_of(after["optimizer"])
    for step in range(310):
        theirs = float(before["schedule"](step))
        assert schedule.lr_at(step) == pytest.approx(theirs, abs=FLOAT32_ROUNDINGS)


@pytest.mark.parametrize("nesterov", [False, True])
def test_update_equals_keras_with_a_constant_lr(nesterov):
    keras = import_or_skip("keras")
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = keras.Variable([1.0, -2.0])
        keras_optimizer = keras.optimizers.SGD(0.1, **options)
        keras_optimizer.build([theirs])
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = FusedSGDR(
        [param], lr=0.1, eta_min=0.1, T_0=10, decoupled_weight_decay=True, **options
    )
    for step in range(10):
        param.grad = torch.tensor([0.3, 0.1]) * (step + 1)
        keras_optimizer.apply([param.grad.clone()])
        optimizer.step()
        torch.testing.assert_close(param.detach(), theirs.value.detach())


def test_lrs_equal_hugging_face(before_and_after):
    before, after = before_and_after(FROM_HUGGING_FACE)
    schedule = schedule_of(after["optimizer"])
    for step in range(70):
        theirs = before["scheduler"].get_last_lr()[0]
        assert schedule.lr_at(step) == pytest.approx(theirs, abs=FLOAT64_ROUNDINGS)
        before["optimizer"].step()
        before["scheduler"].step()
    assert schedule.lr_at(65) == 0


def test_lrs_equal_hugging_faces_single_cosines():
    transformers = import_or_skip("transformers")
    single = {
        0.0: transformers.get_cosine_schedule_with_warmup,
        0.01: transformers.get_cosine_with_min_lr_schedule_with_warmup,
    }
    for eta_min, make in single.items():
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        min_lr = {"min_lr": eta_min} if eta_min else {}
        theirs = make(sgd, num_warmup_steps=5, num_training_steps=65, **min_lr)
        schedule = CosineWarmRestarts(lr=0.1, T_0=60, n_cycles=1, warmup_steps=5, eta_min=eta_min)
        for step in range(65):
            assert schedule.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-15), step
            sgd.step()
            theirs.step()


def test_fit_T_0_leaves_the_remainder_at_eta_min():
    T_0 = fit_T_0(64, n_cycles=3)
    schedule = CosineWarmRestarts(lr=0.1, T_0=T_0, n_cycles=3, eta_min=0.01)
    assert T_0 == 21
    assert schedule.lr_at(63) == 0.01
    assert schedule.lr_at(62) > 0.01
