"""step_in_backward(): each parameter is updated as its gradient arrives, which is then freed."""

import contextlib
import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pair import assert_same_state, copies_of, make_params, make_scaler
from torch.utils.checkpoint import checkpoint

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
    optimizer.zero_grad()
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
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(optimizer.state_dict())


def test_step_with_a_closure_updates_within_its_backward(backend):
    ours, usual = make_model(), make_model()
    optimizers = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    optimizers[0].step_in_backward()
    for step in range(3):
        for model, optimizer in zip((ours, usual), optimizers, strict=True):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(optimizers[0], params[0], optimizers[1], params[1])


def test_two_threads_may_run_backward_at_once(backend):
    """As the devices of one model do. Beyond 131,072 elements a step lets go of the GIL."""
    params = make_params([300_000] * 6)
    optimizer = FusedSGDR(params, **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    before = [param.detach().clone() for param in params]
    with ThreadPoolExecutor(2) as pool:
        losses = [sum(param.sum() for param in part) for part in (params[::2], params[1::2])]
        list(pool.map(torch.Tensor.backward, losses))
    assert not any(map(torch.equal, params, before))


# The hooks follow the groups


def backward_of(params, factors):
    """Gives each parameter the gradient that is its factor, by one backward()."""
    sum((factor * p).sum() for p, factor in zip(params, factors, strict=True)).backward()


def zeros(count):
    return [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]


def moves(params):
    return [param[0].item() for param in params]


def edit_in_place(group, params):
    group["params"][:] = params


def edit_by_assignment(group, params):
    group["params"] = list(params)


EDITS = [edit_in_place, edit_by_assignment]


@pytest.mark.parametrize("edit", EDITS)
def test_reordered_parameters_get_their_own_gradients(backend, edit):
    """The list [a, b, c] is sorted into [c, b, a]; each must move by its own gradient."""
    a, b, c = zeros(3)
    optimizer = FusedSGDR([a, b, c], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    edit(optimizer.param_groups[0], [c, b, a])
    backward_of([a, b, c], [-1, -10, -100])
    assert moves([a, b, c]) == [1, 10, 100]


@pytest.mark.parametrize("edit", EDITS)
def test_frozen_parameters_may_be_dropped_from_the_list(backend, edit):
    *frozen, head = zeros(4)
    optimizer = FusedSGDR([*frozen, head], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    for param in frozen:
        param.requires_grad_(False)
    edit(optimizer.param_groups[0], [head])
    backward_of([head], [-1])
    assert moves([*frozen, head]) == [0, 0, 0, 1]


@pytest.mark.parametrize("edit", EDITS)
def test_groups_before_the_parameters_may_become_shorter(backend, edit):
    a, b, c, d = zeros(4)
    optimizer = FusedSGDR([{"params": [a, b]}, {"params": [c, d]}], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of([a, b, c, d], [-1] * 4)
    optimizer.step()
    before = moves([a, b, c, d])
    edit(optimizer.param_groups[0], [b])
    optimizer.param_groups.reverse()
    backward_of([b, c, d], [-1] * 3)
    lr = optimizer.get_last_lr()[0]
    assert [after - x for after, x in zip(moves([a, b, c, d]), before, strict=True)] == (
        pytest.approx([0, lr, lr, lr])
    )


def test_unfrozen_parameter_is_updated_by_each_gradient_alone(backend):
    """Without a hook its gradients would add up, as the loop has no zero_grad()."""
    ours, usual = make_model(), make_model()
    sides = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    for model in (ours, usual):
        model[0].requires_grad_(False)
    sides[0].step_in_backward()
    for step in range(6):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            model[0].requires_grad_(step in (2, 3, 5))
            optimizer.zero_grad() if model is usual else None
            loss_of(model, step).backward()
            optimizer.step()
        params = [list(model.parameters()) for model in (ours, usual)]
        assert_same_state(sides[0], params[0], sides[1], params[1], f"after step {step}")
        assert all(param.grad is None for param in ours.parameters())
    loss_of(ours, 6).backward()
    assert ours[0].weight.grad is None


@pytest.mark.parametrize("way", ["add_param_group", "append"])
def test_parameters_added_later_are_updated_in_backward(backend, way):
    ours, usual = make_model(), make_model()
    sides = [FusedSGDR(m[2].parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    sides[0].step_in_backward()
    for step in range(5):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            if step == 2 and way == "append":
                optimizer.param_groups[0]["params"] += list(model[0].parameters())
            elif step == 2:
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
            model.zero_grad() if model is usual or step <= 2 else None
            loss_of(model, step).backward()
            optimizer.step()
        params = [list(model.parameters()) for model in (ours, usual)]
        assert_same_state(sides[0], params[0], sides[1], params[1], f"after step {step}")
    loss_of(ours, 6).backward()
    assert all(param.grad is None for param in ours.parameters())


def test_parameter_that_left_keeps_its_gradient_and_loses_its_hook(backend):
    a, b = zeros(2)
    optimizer = FusedSGDR([a, b], lr=1.0, momentum=0.9, T_0=10, backend=backend)
    optimizer.step_in_backward()
    del optimizer.param_groups[0]["params"][0]
    backward_of([a, b], [-1, -1])
    assert moves([a, b]) == [0, 1]
    assert torch.equal(a.grad, torch.full((2,), -1.0))
    optimizer.step()
    assert moves([a, b]) == [0, 1]
    assert not a._post_accumulate_grad_hooks
    gone = weakref.ref(a)
    del a
    gc.collect()
    assert gone() is None


def test_replaced_parameters_are_updated(backend):
    """Their ids may be those of the old ones, which are freed."""
    params = zeros(3)
    optimizer = FusedSGDR(params, lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of(params, [-1] * 3)
    for _ in range(3):
        optimizer.step()
        lr = optimizer.get_last_lr()[0]
        params.clear()
        optimizer.param_groups[0]["params"].clear()
        params += zeros(3)
        optimizer.param_groups[0]["params"] += params
        optimizer.step()
        lr = optimizer.get_last_lr()[0]
        backward_of(params, [-1] * 3)
        assert moves(params) == pytest.approx([lr] * 3)
        assert all(param.grad is None for param in params)


@pytest.mark.parametrize("kind", [tuple, iter])
def test_what_is_no_list_is_left_to_step(backend, kind):
    """It checks and lists them. backward() must not use up an iterator."""
    params = zeros(2)
    optimizer = FusedSGDR([{"params": [p]} for p in params], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    optimizer.param_groups[0]["params"] = kind(params[:1])
    backward_of(params, [-1, -10])
    assert moves(params) == [0, 0]
    assert [param.grad[0].item() for param in params] == [-1, -10]
    optimizer.step()
    assert moves(params) == [1, 10]
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("wrong", [None, torch.zeros(2), {1}], ids=str)
def test_what_cannot_be_listed_is_an_error_in_step(backend, wrong):
    params = zeros(2)
    optimizer = FusedSGDR([{"params": [p]} for p in params], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    optimizer.param_groups[0]["params"] = wrong
    backward_of(params, [-1, -10])
    with pytest.raises(TypeError, match=r"param_groups\[0\]"):
        optimizer.step()
    assert moves(params) == [0, 0]
    optimizer.param_groups[0]["params"] = params[:1]
    optimizer.step()
    assert moves(params) == [1, 10]


def test_error_names_what_was_appended_without_a_name(backend):
    a, b = zeros(2)
    optimizer = FusedSGDR([("a", a)], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    optimizer.param_groups[0]["params"].append(b)
    optimizer.step()
    backward_of([a, b], [-1, -10])
    for param, name in ((a, r"\[0\] \(a\) got"), (b, r"\[1\] got")):
        with pytest.raises(RuntimeError, match=name):
            backward_of([param], [-1])


def test_state_of_another_parameter_does_not_matter(backend):
    a, b = zeros(2)
    optimizer = FusedSGDR([a, b], lr=1.0, momentum=0.9, T_0=10, backend=backend)
    optimizer.step_in_backward()
    b.grad = torch.ones(2)
    optimizer.state[b]["momentum_buffer"] = torch.zeros(3)
    backward_of([a], [-1])
    assert moves([a, b]) == [1, 0]


def test_parameters_may_be_swapped(backend):
    """As Module.to() does with tensor subclasses. torch loses the hook then, and step() updates."""
    ours, usual = make_model(), make_model()
    sides = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    sides[0].step_in_backward()
    for step in range(4):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            if step == 2:
                new = torch.nn.Parameter(torch.ones(20, 6))
                torch.utils.swap_tensors(model[0].weight, new)
            optimizer.zero_grad() if model is usual else None
            loss_of(model, step).backward()
            optimizer.step()
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(sides[0], params[0], sides[1], params[1])
    assert all(param.grad is None for param in ours.parameters())


def test_loading_a_state_dict_leaves_it_on(backend):
    ours, usual = make_model(), make_model()
    sides = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    loss_of(ours, 0).backward()
    sides[0].step()
    sides[0].zero_grad()
    usual.load_state_dict(ours.state_dict())
    saved = copy.deepcopy(sides[0].state_dict())
    sides[0].step_in_backward()
    for optimizer in sides:
        optimizer.load_state_dict(saved)
    for step in range(1, 4):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            optimizer.zero_grad() if model is usual else None
            loss_of(model, step).backward()
            optimizer.step()
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(sides[0], params[0], sides[1], params[1])
    assert all(param.grad is None for param in ours.parameters())


def test_loading_a_state_dict_begins_the_iteration_anew(backend):
    """As after a backward() that ran out of memory half-way."""
    params = zeros(2)
    optimizer = FusedSGDR(params, lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    saved = copy.deepcopy(optimizer.state_dict())
    backward_of(params[:1], [-1])
    with torch.no_grad():
        params[0].zero_()
    optimizer.load_state_dict(saved)
    backward_of(params, [-1, -10])
    assert moves(params) == [1, 10]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_update_in_step(backend, copied):
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    other_model, other = copied((model, optimizer))
    before = [param.detach().clone() for param in other_model.parameters()]
    loss_of(other_model, 0).backward()
    assert all(map(torch.equal, other_model.parameters(), before))
    assert all(param.grad is not None for param in other_model.parameters())
    other.step()
    loss_of(model, 0).backward()
    optimizer.step()
    assert_same_state(optimizer, list(model.parameters()), other, list(other_model.parameters()))
    other.zero_grad()
    other.step_in_backward()


# Where an update within backward() would be wrong


@contextlib.contextmanager
def assert_nothing_moves(optimizer, params):
    """A context: whatever is in it, parameters and state are the same bits afterwards."""
    before = copy.deepcopy((params, optimizer.state_dict()))
    yield
    assert all(map(torch.equal, params, before[0]))
    after = optimizer.state_dict()
    assert after["param_groups"] == before[1]["param_groups"]
    assert after["state"].keys() == before[1]["state"].keys()
    for key, of_param in before[1]["state"].items():
        for role, value in of_param.items():
            assert torch.equal(value, after["state"][key][role]), role


def test_grad_scaler_is_refused_at_its_first_use(backend):
    """The gradients are 65536 times too large within backward()."""
    params = zeros(2)
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=10, backend=backend)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.step_in_backward()
    with assert_nothing_moves(optimizer, params), pytest.raises(RuntimeError, match="GradScaler"):
        scaler.scale(sum(param.sum() for param in params)).backward()
    assert all(param.grad is None for param in params)
    del scaler
    backward_of(params, [-1, -1])
    assert moves(params) == pytest.approx([0.1, 0.1])


def test_loaded_grad_scaler_is_refused_too(backend):
    saved = make_scaler(1024.0)
    saved.update(512.0)
    params = zeros(1)
    optimizer = FusedSGDR(params, lr=0.1, T_0=10, backend=backend)
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(saved.state_dict())
    optimizer.step_in_backward()
    with assert_nothing_moves(optimizer, params), pytest.raises(RuntimeError, match="GradScaler"):
        scaler.scale(params[0].sum()).backward()


def test_grad_scaler_that_starts_later_is_refused_in_its_step(backend):
    params = zeros(1)
    optimizer = FusedSGDR(params, lr=0.1, T_0=10, backend=backend)
    handle = optimizer.step_in_backward()
    backward_of(params, [-1])
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(params[0].sum()).backward()
    with (
        assert_nothing_moves(optimizer, params),
        pytest.raises(RuntimeError, match="cannot be used with a GradScaler"),
    ):
        scaler.step(optimizer)
    # The scaler's leftovers do not change the steps that follow.
    handle.remove()
    twins = copies_of(params)
    twin = FusedSGDR(twins, lr=0.1, T_0=10, backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    for side, of_side in ((params, optimizer), (twins, twin)):
        side[0].grad = torch.ones(2)
        of_side.step()
    assert torch.equal(params[0], twins[0])


@pytest.mark.parametrize("disabled", [True, False])
def test_grad_scaler_of_another_training_is_allowed(backend, disabled):
    """A disabled one, or one that has been updated since its first loss."""
    scaler = torch.amp.GradScaler("cpu", enabled=not disabled)
    trained = zeros(1)
    other = torch.optim.SGD(trained, lr=0.1)
    scaler.scale(trained[0].sum()).backward()
    scaler.step(other)
    scaler.update()
    params = zeros(1)
    optimizer = FusedSGDR(params, lr=0.1, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of(params, [-1])
    assert moves(params) == pytest.approx([0.1])


def test_backward_within_swap_ema_is_an_error(backend):
    model, usual = make_model(), make_model()
    options = OPTIONS | {"ema_decay": 0.9, "backend": backend}
    optimizer, in_step = (FusedSGDR(m.parameters(), **options) for m in (model, usual))
    optimizer.step_in_backward()
    for step in range(4):
        if step == 2:
            with assert_nothing_moves(optimizer, list(model.parameters())), optimizer.swap_ema():
                with pytest.raises(
                    RuntimeError, match=r"backward\(\) was called within a swap_ema"
                ):
                    loss_of(model, step).backward()
                assert all(param.grad is None for param in model.parameters())
        loss_of(model, step).backward()
        optimizer.step()
        in_step.zero_grad()
        loss_of(usual, step).backward()
        in_step.step()
    params = [list(side.parameters()) for side in (model, usual)]
    assert_same_state(optimizer, params[0], in_step, params[1])


def test_second_gradient_before_step_is_an_error(backend):
    """Accumulation: the first gradient has been applied, so they cannot be added up."""
    ours, usual = make_model(), make_model()
    sides = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    sides[0].step_in_backward()
    loss_of(ours, 0).backward()
    with (
        assert_nothing_moves(sides[0], list(ours.parameters())),
        pytest.raises(RuntimeError, match=r"\[3\] got a second gradient since the last step"),
    ):
        loss_of(ours, 1).backward()
    sides[0].step()
    loss_of(ours, 2).backward()
    sides[0].step()
    for step in (0, 2):
        sides[1].zero_grad()
        loss_of(usual, step).backward()
        sides[1].step()
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(sides[0], params[0], sides[1], params[1])


def gan_losses(generator, discriminator, step):
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    of_discriminator = discriminator(generator(noise).detach()).square().mean()
    return of_discriminator, lambda: -discriminator(generator(noise)).mean()


def make_gan():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)


def test_loss_of_another_model_is_an_error_at_the_next_gradient(backend):
    """A GAN: the generator's loss reaches the discriminator, whose gradients the usual loop
    drops by zero_grad()."""
    generator, discriminator = make_gan()
    optimizer = FusedSGDR(discriminator.parameters(), **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    own, others = gan_losses(generator, discriminator, 0)
    own.backward()
    optimizer.step()
    others().backward()
    optimizer.zero_grad()
    own, _ = gan_losses(generator, discriminator, 1)
    with pytest.raises(RuntimeError, match=r"loss of another model.*backward\(inputs=...\)"):
        own.backward()


def test_loss_of_another_model_may_name_its_inputs(backend):
    sides = []
    for in_backward in (True, False):
        generator, discriminator = make_gan()
        optimizer = FusedSGDR(discriminator.parameters(), **OPTIONS, backend=backend)
        if in_backward:
            optimizer.step_in_backward()
        for step in range(3):
            own, others = gan_losses(generator, discriminator, step)
            optimizer.zero_grad()
            own.backward()
            optimizer.step()
            others().backward(inputs=list(generator.parameters()))
        sides += [optimizer, list(discriminator.parameters())]
    assert_same_state(*sides)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_equal_plain_ones(backend, reentrant):
    ours, usual = make_model(), make_model()
    sides = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    sides[0].step_in_backward()
    for step in range(3):
        input = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()
        for model, optimizer in zip((ours, usual), sides, strict=True):
            output = input
            for layer in model:
                if model is usual:
                    output = layer(output)
                else:
                    output = checkpoint(layer, output, use_reentrant=reentrant)
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(sides[0], params[0], sides[1], params[1])


def train_shared_layer(layer, step, **options):
    output = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).requires_grad_()
    for _ in range(3):
        output = checkpoint(layer, output, **options) if options else layer(output)
    output.square().mean().backward()


def test_reentrant_checkpoints_of_a_shared_layer_are_an_error(backend):
    """Each of them gives the layer a gradient of its own: three updates an iteration."""
    layer = torch.nn.Linear(5, 5)
    optimizer = FusedSGDR(layer.parameters(), **OPTIONS, backend=backend)
    optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        train_shared_layer(layer, 0, use_reentrant=True)


def test_checkpoints_of_a_shared_layer_update_it_once(backend):
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 5)
    usual = copy.deepcopy(ours)
    sides = [FusedSGDR(m.parameters(), **OPTIONS, backend=backend) for m in (ours, usual)]
    sides[0].step_in_backward()
    for step in range(3):
        train_shared_layer(ours, step, use_reentrant=False)
        sides[0].step()
        sides[1].zero_grad()
        train_shared_layer(usual, step)
        sides[1].step()
    params = [list(model.parameters()) for model in (ours, usual)]
    assert_same_state(sides[0], params[0], sides[1], params[1])


def test_gradients_that_are_there_already_are_refused(backend):
    """The next backward() would add to those of the last step."""
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    loss_of(model, 0).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"has a gradient.*call zero_grad\(\)"):
        optimizer.step_in_backward()
    optimizer.zero_grad()
    optimizer.step_in_backward()


def test_gradient_set_by_hand_is_used_once(backend):
    params = zeros(2)
    optimizer = FusedSGDR(params, lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of(params[:1], [-1])
    params[1].grad = torch.full((2,), -10.0)
    optimizer.step()
    optimizer.step()
    assert moves(params) == [1, 10]


def test_gradient_that_comes_back_after_its_update_is_an_error(backend):
    """As DistributedDataParallel writes it, if it is made after the first backward()."""
    params = zeros(2)
    optimizer = FusedSGDR(params, lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of(params, [-1, -1])
    params[1].grad = torch.ones(2)
    with (
        assert_nothing_moves(optimizer, params),
        pytest.raises(RuntimeError, match=r"\[1\] has a gradient again after its update"),
    ):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert moves(params) == [1, 1]


def tie(param, other):
    param.data = other.data


def overlap(param, other):
    memory = torch.zeros(3)
    param.data, other.data = memory[:2], memory[1:]


@pytest.mark.parametrize("share", [tie, overlap])
@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_that_share_memory_are_refused(backend, share, frozen):
    """Autograd does not notice that the update of one changes the other."""
    a, b, c = zeros(3)
    share(a, c)
    c.requires_grad_(not frozen)
    optimizer = FusedSGDR([a, b, c], lr=1.0, T_0=10, backend=backend)
    with pytest.raises(RuntimeError, match=r"\[(0|2)\] and .*\[(0|2)\] share memory"):
        optimizer.step_in_backward()
    assert not any(param._post_accumulate_grad_hooks for param in (a, b, c))


def test_parameters_tied_later_are_refused_in_step(backend):
    a, b = zeros(2)
    optimizer = FusedSGDR([a, b], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of([a, b], [-1, -1])
    optimizer.step()
    tie(a, b)
    with assert_nothing_moves(optimizer, [a, b]), pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()


def test_parameters_side_by_side_in_one_memory_are_updated(backend):
    memory = torch.zeros(3, 2)
    params = zeros(3)
    for param, row in zip(params, memory, strict=True):
        param.data = row
    optimizer = FusedSGDR(params, lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of(params, [-1, -10, -100])
    assert moves(params) == [1, 10, 100]


def test_parameter_used_in_two_places_is_updated_once(backend):
    param, other = zeros(2)
    optimizer = FusedSGDR([param, other], lr=1.0, T_0=10, backend=backend)
    optimizer.step_in_backward()
    backward_of([param, param, other], [-1, -10, -100])
    assert moves([param, other]) == [11, 100]


# Lifetime


def hooks_on(params):
    return [len(param._post_accumulate_grad_hooks or ()) for param in params]


def test_hooks_do_not_keep_the_optimizer_alive(backend):
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    handle = optimizer.step_in_backward()
    state, gone = optimizer.state, weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not handle.is_active
    assert hooks_on(model.parameters()) == [0] * 4
    loss_of(model, 0).backward()
    assert len(state) == 0


def test_handle_and_hooks_do_not_keep_the_model_alive(backend):
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    handle = optimizer.step_in_backward()
    loss_of(model, 0).backward()
    optimizer.step()
    gone = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert gone() is None
    handle.remove()


def test_cell_of_a_notebook_may_be_run_again(backend):
    """Each run makes a new optimizer; the hooks of the old one would stay on the parameters."""
    ours, usual = make_model(), make_model()
    for run in range(3):
        optimizer = FusedSGDR(ours.parameters(), **OPTIONS, backend=backend)
        optimizer.me = optimizer  # only the garbage collector frees it
        handle = optimizer.step_in_backward()
        assert hooks_on(ours.parameters()) == [1] * 4
        loss_of(ours, run).backward()
        optimizer.step()
        in_step = FusedSGDR(usual.parameters(), **OPTIONS, backend=backend)
        in_step.zero_grad()
        loss_of(usual, run).backward()
        in_step.step()
        params = [list(model.parameters()) for model in (ours, usual)]
        assert_same_state(optimizer, params[0], in_step, params[1])
        del optimizer
    assert handle.is_active


def test_another_optimizers_hooks_on_a_parameter_are_an_error(backend):
    a, b = zeros(2)
    first = FusedSGDR([a], lr=1.0, T_0=10, backend=backend)
    second = FusedSGDR([b, a], lr=1.0, T_0=10, backend=backend)
    handle = first.step_in_backward()
    with pytest.raises(RuntimeError, match=r"another optimizer updates .*\[1\] already"):
        second.step_in_backward()
    assert hooks_on([a, b]) == [1, 0]
    handle.remove()
    second.step_in_backward()
    backward_of([a, b], [-1, -10])
    assert moves([a, b]) == [1, 10]


def test_model_that_refers_to_its_optimizer_is_freed(backend):
    """With the optimizer on a parameter the two are a cycle, which hooks must not hold."""
    model = make_model()
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, backend=backend)
    handle = optimizer.step_in_backward()
    model[0].weight.optimizer = optimizer
    loss_of(model, 0).backward()
    optimizer.step()
    gone = weakref.ref(optimizer), weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert not handle.is_active
