"""Training with torch.amp.GradScaler equals torch.optim.SGD's for-loop with the same scaler.

Scales are powers of two, GradScaler's default. Dividing by such a scale is exact, and so is
multiplying by its reciprocal, which is what torch does.
"""

import math

import pytest
import torch
from pair import (
    Pair,
    assert_same,
    assert_unchanged,
    copies_of,
    give_gradients,
    make_params,
    make_scaler,
    snapshot,
)

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.1, "T_0": 3, "T_mult": 2}


class Scaled:
    """Our optimizer and the pair, each with a scaler, on equal scaled gradients."""

    def __init__(self, backend, dtype=torch.float32, scaler=None, sizes=(65, 8, 33), **options):
        options = OPTIONS | options
        self.ours = make_params(sizes, dtype)
        self.theirs = copies_of(self.ours)
        self.optimizer = FusedSGDR(self.ours, backend=backend, **options)
        self.pair = Pair(self.theirs, **options)
        scaler = {"init_scale": 1024.0, "growth_interval": 3} | (scaler or {})
        self.our_scaler, self.their_scaler = make_scaler(**scaler), make_scaler(**scaler)

    def step(self, index, bad=None, unscale=False):
        """One scaled step on both sides; `bad`, if given, is written into a gradient."""
        give_gradients(index, self.ours, self.theirs)
        for params, scaler in ((self.ours, self.our_scaler), (self.theirs, self.their_scaler)):
            for param in params:
                param.grad *= scaler.get_scale()
            if bad is not None:
                params[-1].grad[-1] = bad
        if unscale:
            self.our_scaler.unscale_(self.optimizer)
            self.their_scaler.unscale_(self.pair.sgd)
        before = snapshot(self.optimizer, self.ours)
        self.our_scaler.step(self.optimizer)
        self.their_scaler.step(self.pair.sgd)
        if bad is None:
            self.pair.scheduler.step()
        else:
            assert_unchanged(before, self.optimizer, self.ours)
        self.our_scaler.update()
        self.their_scaler.update()
        assert self.our_scaler.get_scale() == self.their_scaler.get_scale()
        assert_same(self.optimizer, self.ours, self.pair, self.theirs, f"after step {index}")


def test_scaled_training_equals_the_pair(backend, dtype, sgd_options):
    both = Scaled(backend, dtype, **sgd_options)
    scales = set()
    for step in range(12):
        both.step(step)
        scales.add(both.our_scaler.get_scale())
    assert len(scales) > 3, "the scale has grown on the way"


@pytest.mark.parametrize("skipped", [[0], [4], [0, 1, 2], [2, 3, 6, 7]], ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_steps_with_bad_gradients_are_skipped(backend, skipped, bad):
    both = Scaled(backend, momentum=0.9, dampening=0.3, weight_decay=1e-2)
    for step in range(9):
        both.step(step, bad if step in skipped else None)
    assert both.optimizer.param_groups[0]["step"] == 9 - len(skipped)


@pytest.mark.parametrize("skipped", [[], [0], [3]], ids=str)
def test_gradients_unscaled_before_the_step_are_not_unscaled_again(backend, skipped):
    """scaler.unscale_() is called to clip gradients, for example."""
    both = Scaled(backend, momentum=0.9)
    for step in range(6):
        both.step(step, math.inf if step in skipped else None, unscale=True)


def test_unscale_may_be_called_on_some_steps_only(backend):
    both = Scaled(backend, momentum=0.9)
    for step in range(8):
        both.step(step, unscale=step % 3 == 1)


def test_scaled_gradients_are_not_written_back(backend):
    both = Scaled(backend, momentum=0.9, weight_decay=0.1)
    give_gradients(0, both.ours)
    kept = [p.grad.clone() for p in both.ours]
    both.our_scaler.step(both.optimizer)
    for param, grad in zip(both.ours, kept, strict=True):
        assert torch.equal(param.grad, grad)


def test_step_without_the_scaler_is_not_scaled(backend):
    both = Scaled(backend, momentum=0.9)
    both.step(0)
    give_gradients(1, both.ours, both.theirs)
    both.optimizer.step()
    both.pair.step()
    assert_same(both.optimizer, both.ours, both.pair, both.theirs)


def test_disabled_scaler_changes_nothing(backend):
    ours, theirs = make_params([65]), make_params([65])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(4):
        give_gradients(step, ours, theirs)
        scaler.step(optimizer)
        scaler.update()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)


def test_half_precision_gradients_are_unscaled_in_float32(backend, half_dtype):
    """2 ** -20 underflows in float16: unscaling in place would lose it, and torch refuses to."""
    ours, theirs = make_params([65], torch.float32), make_params([65], torch.float32)
    for param in ours:
        param.grad_dtype = half_dtype
    optimizer = FusedSGDR(ours, backend=backend, momentum=0.9, **OPTIONS)
    pair = Pair(theirs, momentum=0.9, **OPTIONS)
    for step in range(4):
        give_gradients(step, theirs)
        ours[0].grad = theirs[0].grad.to(half_dtype)
        theirs[0].grad = ours[0].grad.float() / 2.0**20
        make_scaler(2.0**20).step(optimizer)
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_any_scale_equals_the_reference(dtype, any_options):
    ours, theirs = make_params([65, 257], dtype), make_params([65, 257], dtype)
    options = OPTIONS | any_options
    sides = [
        (FusedSGDR(ours, backend="native", **options), ours),
        (FusedSGDR(theirs, backend="reference", **options), theirs),
    ]
    for step, scale in enumerate([3.0, 1000.0, 0.1, 0.1, 3.0]):
        give_gradients(step, ours, theirs)
        for optimizer, _ in sides:
            make_scaler(scale).step(optimizer)
        assert_same(*sides[0], *sides[1], f"after step {step}")


def test_nan_in_any_group_skips_the_step(backend):
    params = make_params([9, 5, 3])
    groups = [{"params": [param]} for param in params]
    optimizer = FusedSGDR(groups, momentum=0.9, backend=backend, **OPTIONS)
    for bad in range(3):
        give_gradients(bad, params)
        params[bad].grad[0] = math.nan
        before = snapshot(optimizer, params)
        make_scaler(2.0).step(optimizer)
        assert_unchanged(before, optimizer, params)


def test_scaler_ignores_a_parameter_without_a_gradient(backend):
    both = Scaled(backend, momentum=0.9)
    give_gradients(0, both.ours, both.theirs)
    for params, scaler, optimizer in (
        (both.ours, both.our_scaler, both.optimizer),
        (both.theirs, both.their_scaler, both.pair.sgd),
    ):
        params[0].grad = None
        scaler.step(optimizer)
    both.pair.scheduler.step()
    assert_same(both.optimizer, both.ours, both.pair, both.theirs)


def test_training_with_autocast_equals_the_pair(backend):
    def train(make_optimizer):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1))
        stepper = make_optimizer(model.parameters())
        optimizer = getattr(stepper, "sgd", stepper)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
        for step in range(12):
            batch = torch.randn(11, 7, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch).square().mean()
            if step == 5:
                loss = loss * math.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if isinstance(stepper, Pair) and step != 5:
                stepper.scheduler.step()
        return list(model.parameters()), stepper

    options = {"momentum": 0.9, "nesterov": True} | OPTIONS
    ours, optimizer = train(lambda params: FusedSGDR(params, backend=backend, **options))
    theirs, pair = train(lambda params: Pair(params, **options))
    assert_same(optimizer, ours, pair, theirs)


def test_step_that_raises_under_a_scaler_leaves_no_scale_behind(backend):
    """The next step divided by the scale twice."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = FusedSGDR([param], lr=1.0, T_0=1000, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for is_valid in (False, True):
        optimizer.param_groups[0]["momentum"] = 0.0 if is_valid else -1.0
        optimizer.zero_grad()
        scaler.scale(param.sum()).backward()
        if is_valid:
            scaler.step(optimizer)
        else:
            with pytest.raises(ValueError, match="momentum"):
                scaler.step(optimizer)
        scaler.update()
    assert param.tolist() == [-1.0] * 3
