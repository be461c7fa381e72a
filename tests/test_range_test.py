"""lr_range_test(): which LR should the schedule start from?"""

import copy
import math

import pytest
import torch
from pair import assert_same_state, make_scaler, same_bits
from torch.optim.swa_utils import SWALR

from sgdr_fused import FusedSGDR, lr_range_test

OPTIONS = {"lr": 0.1, "momentum": 0.9, "T_0": 3, "reset_momentum": True, "ema_decay": 0.9}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads take longer to wake than such a small model to train."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Training:
    """A model with a BatchNorm and a dropout, its optimizer, and steps on random batches."""

    def __init__(self, backend, **options):
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(16, 3),
        )
        groups = [
            {"params": self.model[0].parameters()},
            {"params": [*self.model[1].parameters(), *self.model[3].parameters()], "lr": 0.025},
        ]
        self.optimizer = FusedSGDR(groups, backend=backend, **OPTIONS | options)
        self.lrs = []

    @property
    def params(self):
        return list(self.model.parameters())

    def step(self):
        input, noise = torch.randn(32, 6), torch.randn(32, 3)
        self.optimizer.zero_grad()
        loss = (self.model(input) - input[:, :3] - 0.1 * noise).square().mean()
        loss.backward()
        self.lrs.append(self.optimizer.get_last_lr())
        self.optimizer.step()
        return loss


def test_range_test_raises_the_lr_and_suggests_one(backend):
    """pytorch-lr-finder attaches a scheduler, which FusedSGDR refuses."""
    training = Training(backend)
    result = lr_range_test(training.model, training.optimizer, training.step)
    ratio = 1e6 ** (1 / 99)
    assert training.lrs[0][0] == result.lrs[0] == 1e-5
    for i, (high, low) in enumerate(training.lrs):
        assert high == pytest.approx(1e-5 * ratio**i)
        assert low == high / 4, "the groups keep their ratio"
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) < 100, "it has diverged"
    assert result.smoothed[-1] > 4 * min(result.smoothed)
    assert result.suggestion in result.lrs
    assert 1e-3 < result.suggestion < 1
    slopes = [b - a for a, b in zip(result.smoothed, result.smoothed[2:], strict=False)]
    assert result.lrs.index(result.suggestion) == slopes.index(min(slopes)) + 1


@pytest.mark.parametrize("steps_before", [0, 5])
def test_range_test_restores_everything_bit_for_bit(backend, steps_before):
    training, expected = Training(backend), Training(backend)
    for side in (expected, training):
        torch.manual_seed(2)
        side.ended = []
        side.optimizer.register_restart_hook(side.ended.append)
        for _ in range(steps_before):
            side.step()
        side.optimizer.param_groups[1]["lr"] = 0.77
    random_state = torch.get_rng_state()
    buffers = list(training.model.buffers())
    ended = len(training.ended)
    lr_range_test(training.model, training.optimizer, training.step, n_steps=20)
    assert len(training.ended) == ended, "no cycle ends within the test"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert training.optimizer.get_last_lr() == expected.optimizer.get_last_lr()
    assert all(a is b for a, b in zip(training.model.buffers(), buffers, strict=True))
    for step in range(10):
        assert_same_state(
            training.optimizer, training.params, expected.optimizer, expected.params, step
        )
        for ours, theirs in zip(training.model.buffers(), expected.model.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        random_state = torch.get_rng_state()
        expected.step()
        torch.set_rng_state(random_state)
        training.step()


def test_range_test_restores_buffers_that_the_model_replaces():
    class Counting(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, input):
            self.calls = self.calls + 1
            return super().forward(input)

    model = Counting()
    optimizer = FusedSGDR(model.parameters(), lr=0.1, T_0=5)

    def step():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 2)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    calls = model.calls
    lr_range_test(model, optimizer, step, n_steps=5)
    assert model.calls is calls
    assert calls == 0


def test_range_test_restores_after_an_error(backend):
    training = Training(backend)
    training.step()
    before = copy.deepcopy(training.model.state_dict())

    def fails():
        if len(training.lrs) == 4:
            raise KeyError
        return training.step()

    with pytest.raises(KeyError):
        lr_range_test(training.model, training.optimizer, fails)
    assert training.optimizer.param_groups[0]["step"] == 1
    for name, value in training.model.state_dict().items():
        assert same_bits(value, before[name]), name


def test_range_test_ends_at_a_loss_that_is_not_finite(backend):
    training = Training(backend)

    def step():
        loss = training.step().item()
        return math.nan if len(training.lrs) == 6 else loss

    result = lr_range_test(training.model, training.optimizer, step, stop_at=1e9)
    assert len(result.lrs) == len(result.losses) == 5
    assert all(map(math.isfinite, result.smoothed))


def test_range_test_without_smoothing_notes_the_losses_as_they_are():
    training = Training("reference")
    result = lr_range_test(training.model, training.optimizer, training.step, smoothing=0)
    assert result.smoothed == result.losses


def test_range_test_of_a_loss_that_never_falls_suggests_nothing():
    training = Training("reference")
    rising = iter(range(1, 100))

    def step():
        training.step()
        return next(rising)

    result = lr_range_test(training.model, training.optimizer, step, n_steps=10, stop_at=1e9)
    assert result.suggestion is None


def test_range_test_with_a_grad_scaler_counts_a_skipped_step_as_one(backend):
    training = Training(backend)
    scaler = make_scaler(2.0**120)

    def step():
        training.optimizer.zero_grad()
        loss = training.model(torch.randn(8, 6)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        return loss

    lr_range_test(training.model, training.optimizer, step, n_steps=5, lr_end=1e-4)
    assert training.optimizer.skipped_steps == 0


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError])
def test_range_test_refuses_what_is_none(error):
    training = Training("reference")
    model, optimizer, step = training.model, training.optimizer, training.step
    if error is TypeError:
        with pytest.raises(TypeError, match="to be a FusedSGDR, but got SGD"):
            lr_range_test(model, torch.optim.SGD(model.parameters(), lr=0.1), step)
    elif error is RuntimeError:
        with pytest.raises(RuntimeError, match=r"has not called optimizer.step\(\)"):
            lr_range_test(model, optimizer, lambda: 0.5)
    else:
        for options, message in {
            "lr_start=0": "Invalid lr_start value: 0",
            "lr_end=1e-6": "lr_start < lr_end, but got lr_start=1e-05 and lr_end=1e-06",
            "n_steps=2": "Invalid n_steps value: 2",
            "smoothing=1": "Invalid smoothing value: 1",
            "stop_at=1": "Invalid stop_at value: 1",
        }.items():
            with pytest.raises(ValueError, match=message):
                lr_range_test(model, optimizer, step, **eval(f"dict({options})"))
    assert optimizer.param_groups[0]["step"] == 0


def test_plot_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    training = Training("reference")
    result = lr_range_test(training.model, training.optimizer, training.step)
    result.plot(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").stat().st_size > 1000


def test_refusal_of_a_scheduler_names_the_range_test_and_swa():
    optimizer = Training("reference").optimizer
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(TypeError, match=r'ema_decay="swa" for SWALR.*sgdr_fused.lr_range_test'):
        SWALR(optimizer, swa_lr=0.05)
    assert optimizer.param_groups == before
