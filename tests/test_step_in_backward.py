"""step_in_backward(): each parameter is updated as its gradient arrives, which is then freed."""

import gc

import pytest
import torch
from pair import assert_same_state, copies_of, make_params

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "T_0": 2, "T_mult": 2}


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(8, 6, generator=generator)).square().mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True, "ema_decay": 0.9},
        {"ema_decay": "swa", "reset_momentum": True},
        {"momentum_dtype": torch.bfloat16, "seed": 5},
    ],
    ids=str,
)
def test_updates_in_backward_equal_those_of_step(backend, options):
    ours, usual = make_model(), make_model()
    in_backward = FusedSGDR(ours.parameters(), **OPTIONS, **options, backend=backend)
    in_step = FusedSGDR(usual.parameters(), **OPTIONS, **options, backend=backend)
    in_backward.step_in_backward()
    for step in range(8):
        loss_of(ours, step).backward()
        assert all(p.grad is None for p in ours.parameters())
        in_backward.step()
        in_step.zero_grad()
        loss_of(usual, step).backward()
        in_step.step()
        where = f"after step {step}"
        params = [list(model.parameters()) for model in (ours, usual)]
        assert_same_state(in_backward, params[0], in_step, params[1], where)


def test_one_iteration_is_one_step_of_the_schedule(backend):
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    for step in range(5):
        loss_of(model, step).backward()
        assert optimizer.param_groups[0]["step"] == step
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 5


def test_each_group_has_its_own_lr_in_backward(backend):
    ours, usual = make_model(), make_model()
    sides = []
    for model in (ours, usual):
        groups = [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "lr": 0.01, "T_0": 3, "maximize": True},
        ]
        sides.append(FusedSGDR(groups, **OPTIONS, backend=backend))
    sides[0].step_in_backward()
    for step in range(7):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(sides[0], params[0], sides[1], params[1])


def test_step_updates_what_backward_did_not_reach(backend):
    params = make_params([4, 4])
    twins = copies_of(params)
    optimizer = FusedSGDR(params, **OPTIONS, backend=backend)
    usual = FusedSGDR(twins, **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    for side in (params, twins):
        side[0].square().sum().backward()
        side[1].grad = torch.ones(4)
    optimizer.step()
    usual.step()
    assert_same_state(optimizer, params, usual, twins)


def test_remove_returns_updates_to_step(backend):
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    handle = optimizer.step_in_backward()
    handle.remove()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.step_in_backward()


def test_step_in_backward_twice_is_an_error(backend):
    optimizer = FusedSGDR(make_params([4]), **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="called already"):
        optimizer.step_in_backward()


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_options_that_need_all_gradients_are_refused(backend, option):
    optimizer = FusedSGDR(make_params([4]), **OPTIONS, **option, backend=backend)
    with pytest.raises(ValueError, match=r"needs all gradients before the first update"):
        optimizer.step_in_backward()
    other = FusedSGDR(make_params([4]), **OPTIONS, backend=backend)
    other.step_in_backward()
    for name, value in option.items():
        with pytest.raises(ValueError, match=name):
            setattr(other, name, value)


def test_hooks_do_not_keep_the_optimizer_alive(backend):
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    state = optimizer.state
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert len(state) == 0
