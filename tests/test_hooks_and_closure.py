"""step() behaves like torch.optim.Optimizer's: closure, hooks, profiling and autograd."""

import copy

import pytest
import torch
from pair import Pair, assert_same, copies_of, give_gradients, make_params
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.1, "momentum": 0.9, "T_0": 3}


def make(backend, cls=FusedSGDR):
    params = make_params([9])
    give_gradients(0, params)
    return cls(params, backend=backend, **OPTIONS), params


# ------------------------------------------------------------------------------------------ closure


def test_closure_is_evaluated_with_gradients_and_its_loss_returned(backend):
    ours = make_params([9])
    theirs = copies_of(ours)
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)

    def closure_for(params, stepper):
        def closure():
            assert torch.is_grad_enabled()
            for param in params:
                param.grad = None
            loss = params[0].square().sum()
            loss.backward()
            return loss

        return closure

    for _ in range(5):
        with torch.no_grad():
            loss = optimizer.step(closure_for(ours, optimizer))
        expected = pair.sgd.step(closure_for(theirs, pair))
        pair.scheduler.step()
        assert loss.item() == expected.item()
        assert_same(optimizer, ours, pair, theirs)


def test_closure_may_be_given_by_name(backend):
    optimizer, _ = make(backend)
    assert optimizer.step(closure=lambda: 7) == 7


def test_step_without_a_closure_returns_nothing(backend):
    optimizer, _ = make(backend)
    assert optimizer.step() is None


def test_error_in_a_closure_changes_nothing(backend):
    optimizer, params = make(backend)
    before = params[0].detach().clone()

    def closure():
        raise ArithmeticError("of the user's")

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert torch.equal(params[0], before)
    assert optimizer.param_groups[0]["step"] == 0
    optimizer.step()


def test_step_inside_a_closure_precedes_the_outer_step(backend):
    optimizer, _ = make(backend)
    optimizer.step(lambda: optimizer.step())
    assert optimizer.param_groups[0]["step"] == 2


# -------------------------------------------------------------------------------------------- hooks


def test_hooks_run_around_the_step_in_torchs_order(backend):
    optimizer, params = make(backend)
    before = params[0].detach().clone()
    seen = []

    def note(name):
        def hook(stepped, args, kwargs):
            assert stepped is optimizer
            seen.append((name, torch.equal(params[0], before)))

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen[:2]) == [("global pre", True), ("pre", True)]
    assert sorted(seen[2:]) == [("global post", False), ("post", False)]
    optimizer.step()
    assert len(seen) == 4, "removed hooks run no more"


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda optimizer, hook: optimizer.register_step_post_hook(hook),
        lambda optimizer, hook: register_optimizer_step_pre_hook(hook),
        lambda optimizer, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["pre", "post", "global_pre", "global_post"],
)
def test_hook_added_later_runs_from_then_on(backend, register):
    optimizer, _ = make(backend)
    optimizer.step()
    seen = []
    handle = register(optimizer, lambda *args: seen.append(1))
    try:
        optimizer.step()
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert seen == [1, 1]


def test_pre_hook_may_replace_the_arguments(backend):
    optimizer, _ = make(backend)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "exchanged"), {}))
    assert optimizer.step(lambda: "given") == "exchanged"
    assert optimizer.step() == "exchanged"


def test_pre_hook_may_change_gradients_and_options(backend):
    ours, theirs = make_params([9]), make_params([9])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)

    def hook(stepped, args, kwargs):
        stepped.param_groups[0]["weight_decay"] = 0.1
        for param in stepped.param_groups[0]["params"]:
            param.grad.mul_(0.5)

    optimizer.register_step_pre_hook(hook)
    pair.sgd.register_step_pre_hook(hook)
    for step in range(5):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)


def test_hooks_run_once_if_a_subclass_overrides_step(backend):
    class Announced(FusedSGDR):
        def step(self, closure=None):
            return super().step(closure)

    optimizer, _ = make(backend, Announced)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "post"]


def test_subclass_that_inherits_step_works(backend):
    class Renamed(FusedSGDR):
        pass

    optimizer, params = make(backend, Renamed)
    expected, expected_params = make(backend)
    optimizer.step()
    expected.step()
    assert torch.equal(params[0], expected_params[0])
    assert isinstance(optimizer, Optimizer)
    assert type(copy.deepcopy(optimizer)) is Renamed


# ---------------------------------------------------------------------------------------- profiling


def test_profiler_shows_each_step_under_torchs_name(backend):
    optimizer, _ = make(backend)
    optimizer.step()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # acc_events, or torch 2.11 warns.
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        optimizer.step()
        optimizer.step()
    ranges = [e for e in profile.events() if e.name == "Optimizer.step#FusedSGDR.step"]
    assert len(ranges) == 2
    optimizer.step()


def test_profiler_shows_a_subclass_under_its_own_name(backend):
    class Renamed(FusedSGDR):
        pass

    optimizer, _ = make(backend, Renamed)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#Renamed.step" in {e.name for e in profile.function_events}


def test_profiled_steps_have_the_same_bits(backend):
    optimizer, params = make(backend)
    expected, expected_params = make(backend)
    for step in range(4):
        give_gradients(step, params, expected_params)
        with torch.autograd.profiler.profile():
            optimizer.step()
        expected.step()
        assert_same(optimizer, params, expected, expected_params)


# ----------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(9),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(18)[::2],
        torch.ones(9, dtype=torch.complex64),
        torch.ones(9, dtype=torch.bfloat16),
        torch.ones(200_000),
    ],
    ids=["dense", "channels_last", "strided", "complex", "bfloat16", "large"],
)
def test_graph_saved_before_the_step_refuses_backward_after_it(backend, values):
    param = values.clone().requires_grad_()
    optimizer = FusedSGDR([param], backend=backend, **OPTIONS)
    for _ in range(2):
        param.grad = torch.ones_like(param).contiguous()
        loss = (param * param).sum().abs()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_graph_of_a_parameter_without_a_gradient_allows_backward_after_the_step(backend):
    optimizer, params = make(backend)
    params[0].grad = None
    loss = (params[0] * params[0]).sum()
    optimizer.step()
    loss.backward()


def test_graph_through_the_gradient_allows_backward_after_the_step(backend):
    optimizer, params = make(backend)
    weight = torch.ones(9, requires_grad=True)
    loss = (weight * params[0].grad).sum()
    optimizer.step()
    loss.backward()


def test_graph_through_the_momentum_refuses_backward_after_the_step(backend):
    optimizer, params = make(backend)
    optimizer.step()
    weight = torch.ones(9, requires_grad=True)
    loss = (weight * optimizer.state[params[0]]["momentum_buffer"]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("make_view", [lambda p: p[1:5], lambda p: p.view(3, 3)])
def test_graph_through_a_view_refuses_backward_after_the_step(backend, make_view):
    optimizer, params = make(backend)
    loss = make_view(params[0]).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_records_no_graph(backend):
    optimizer, params = make(backend)
    with torch.enable_grad():
        optimizer.step()
    assert params[0].grad_fn is None
    assert params[0].is_leaf
    assert not optimizer.state[params[0]]["momentum_buffer"].requires_grad
    assert torch.is_grad_enabled()


def test_gradient_may_require_grad(backend):
    """A gradient requires grad after backward(create_graph=True)."""
    ours, theirs = make_params([9]), make_params([9])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for _ in range(3):
        for params in (ours, theirs):
            loss = params[0].pow(3).sum()
            (params[0].grad,) = torch.autograd.grad(loss, params, create_graph=True)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)
    assert not optimizer.state[ours[0]]["momentum_buffer"].requires_grad


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_works_as_in_torch(backend, set_to_none):
    optimizer, params = make(backend)
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert params[0].grad is None
    else:
        assert (params[0].grad == 0).all()
    optimizer.step()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_step_works_in_any_grad_mode(backend, mode):
    ours, theirs = make_params([9]), make_params([9])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(3):
        give_gradients(step, ours, theirs)
        with mode():
            optimizer.step()
        pair.step()
        assert torch.equal(ours[0], theirs[0])


def test_optimizer_per_parameter_may_step_in_backward(backend):
    """Each parameter has its own optimizer, stepped as soon as the gradient is complete."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    theirs = copy.deepcopy(ours)
    optimizers = {p: FusedSGDR([p], backend=backend, **OPTIONS) for p in ours.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in ours.parameters():
        param.register_post_accumulate_grad_hook(step)
    pair = Pair(theirs.parameters(), **OPTIONS)
    for step_index in range(5):
        batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step_index))
        ours(batch).square().sum().backward()
        pair.sgd.zero_grad()
        theirs(batch).square().sum().backward()
        pair.step()
        for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(our, their)
