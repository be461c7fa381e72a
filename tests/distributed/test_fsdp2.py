"""FSDP2, `fully_shard`: each rank updates its shard of every parameter."""

import pytest
import torch
import torch.distributed as dist
from exact_training import OPTIONS, STEPS, SingleProcess, fused, loss_of, network, whole_tensor
from pair import same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sgdr_fused.snapshots import Snapshots


def sharded(model, mesh_shape=None):
    """The model with each layer sharded; replicated over the first dimension of a 2d mesh."""
    names = ("copies", "shards")
    shape = mesh_shape or (1, dist.get_world_size())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    mesh = mesh if mesh_shape else mesh["shards"]
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return model


def train(backend, parts=1, mesh_shape=None):
    rank, single = dist.get_rank(), SingleProcess(dist.get_world_size(), parts)
    model = sharded(network(), mesh_shape)
    optimizer = fused(model, backend=backend)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            model.set_requires_gradient_sync(part + 1 == parts)
            (loss_of(model, step, rank, part) / parts).backward()
        optimizer.step()
        single.step()
        single.assert_same(model, f"at step {step}")
        assert optimizer.get_last_lr() == single.optimizer.scheduler.get_last_lr()


def test_training_equals_that_of_one_process(ranks, world_size, backend):
    ranks(world_size, train, backend)


def test_accumulated_batches_are_one_step(ranks, backend):
    ranks(2, train, backend, parts=2)


def test_copies_of_shards_stay_equal(ranks, backend):
    """HSDP: sharded within a host, replicated across hosts."""
    ranks(4, train, backend, mesh_shape=(2, 2))


def one_step_of_torchs_own():
    model = sharded(network())
    fused_sgd = torch.optim.SGD(model.parameters(), fused=True, **OPTIONS)
    loss_of(model, 0).backward()
    try:
        fused_sgd.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_torchs_own_fused_step_has_no_sharding_strategy(ranks):
    """SGD(fused=True) cannot take a step under FSDP2, as ours does in the tests above."""
    for error in ranks(2, one_step_of_torchs_own):
        assert "aten._fused_sgd_.default" in error
        assert "sharding strategy" in error


def train_with(options, in_backward=False, parts=1, mesh_shape=None):
    """Compares with our own optimizer in one process, for options that the pair lacks."""
    single = SingleProcess(dist.get_world_size(), parts, lambda model: fused(model, **options))
    model = sharded(network(), mesh_shape)
    optimizer = fused(model, **options)
    if in_backward:
        optimizer.step_in_backward()
    for step in range(STEPS):
        if not in_backward:
            optimizer.zero_grad()
        for part in range(parts):
            model.set_requires_gradient_sync(part + 1 == parts)
            (loss_of(model, step, dist.get_rank(), part) / parts).backward()
        if in_backward:
            assert all(param.grad is None for param in model.parameters())
        optimizer.step()
        single.step()
        single.assert_same(model, f"at step {step}")
        single.assert_same_state(optimizer, f"at step {step}")
    with optimizer.swap_ema(), single.optimizer.swap_ema():
        single.assert_same(model, "averaged")
    single.assert_same(model, "after the averages")


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9},
        {"ema_decay": "swa"},
        {"reset_momentum": True, "decoupled_weight_decay": True},
        {"nesterov": False, "dampening": 0.1, "maximize": True},
        {"momentum": 0, "nesterov": False},
    ],
    ids=str,
)
def test_our_own_options_work_on_shards(ranks, backend, options):
    ranks(2, train_with, options | {"backend": backend})


def test_step_in_backward_updates_shards(ranks, backend):
    ranks(2, train_with, {"backend": backend, "ema_decay": 0.9}, in_backward=True)


def test_step_in_backward_may_accumulate_before_the_ranks_are_summed(ranks, backend):
    """set_requires_gradient_sync(False): the hooks see the sum of the batches only."""
    ranks(2, train_with, {"backend": backend}, in_backward=True, parts=2)


def test_step_in_backward_keeps_copies_of_shards_equal(ranks, backend):
    ranks(4, train_with, {"backend": backend}, in_backward=True, mesh_shape=(2, 2))


def refuse_second_gradient():
    model = sharded(network())
    optimizer = fused(model)
    optimizer.step_in_backward()
    loss_of(model, 0).backward()
    before = [whole_tensor(param).clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="second gradient since the last step"):
        loss_of(model, 1).backward()
    assert all(map(torch.equal, map(whole_tensor, model.parameters()), before))


def test_second_gradient_before_step_is_an_error(ranks):
    ranks(2, refuse_second_gradient)


def refuse_backward_within_swap_ema(backend):
    model = sharded(network())
    optimizer = fused(model, ema_decay=0.5, backend=backend)
    optimizer.step_in_backward()
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    before = [whole_tensor(param).clone() for param in model.parameters()]
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="within a swap_ema"):
        loss_of(model, 2).backward()
    assert all(map(torch.equal, map(whole_tensor, model.parameters()), before))
    assert all(param.grad is None for param in model.parameters())


def test_backward_within_swap_ema_is_an_error(ranks, backend):
    ranks(2, refuse_backward_within_swap_ema, backend)


def backward_after_a_step(backend):
    model = sharded(network())
    optimizer = fused(model, backend=backend)
    loss_of(model, 0).backward()
    weight = model[2].weight
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["native"])
def test_graph_of_shards_saved_before_the_step_refuses_backward_after_it(ranks, backend):
    ranks(2, backward_after_a_step, backend)


def train_in_bfloat16():
    """Gradients are rounded, so the single process gets the ranks' gradients."""
    model, single = sharded(network().bfloat16()), network().bfloat16()
    options = {"master_weights": True, "ema_decay": 0.9}
    optimizer, alone = fused(model, **options), fused(single, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step * 10 + dist.get_rank())
        model(torch.randn(4, 7, generator=generator).bfloat16()).square().sum().backward()
        for param, whole in zip(model.parameters(), single.parameters(), strict=True):
            whole.grad = whole_tensor(param.grad)
        optimizer.step()
        alone.step()
        for param, whole in zip(model.parameters(), single.parameters(), strict=True):
            assert same_bits(whole_tensor(param), whole.detach())
            for role, tensor in alone.state[whole].items():
                assert tensor.dtype == torch.float32, role
                assert same_bits(whole_tensor(optimizer.state[param][role]), tensor), role


def test_master_weights_are_kept_in_shards(ranks):
    ranks(2, train_in_bfloat16)


def snapshot_of_shards():
    model = sharded(network())
    with pytest.raises(TypeError, match=r"'0.weight' is in shards.*register_restart_hook"):
        Snapshots(model, fused(model)).take(0)


def test_snapshot_of_shards_is_refused(ranks):
    ranks(2, snapshot_of_shards)
