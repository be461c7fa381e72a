"""DistributedDataParallel: every rank takes the same step."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from exact_training import STEPS, SingleProcess, fused, loss_of, network
from torch.nn.parallel import DistributedDataParallel

from sgdr_fused import FusedSGDR


def train(backend, parts, as_views):
    rank, single = dist.get_rank(), SingleProcess(dist.get_world_size(), parts)
    model = DistributedDataParallel(network(), gradient_as_bucket_view=as_views)
    optimizer = fused(model, backend=backend)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            with model.no_sync() if part + 1 < parts else nullcontext():
                (loss_of(model, step, rank, part) / parts).backward()
        optimizer.step()
        single.step()
        single.assert_same(model, f"at step {step}")
        assert optimizer.get_last_lr() == single.optimizer.scheduler.get_last_lr()


@pytest.mark.parametrize("as_views", [False, True], ids=["own_grads", "grads_are_bucket_views"])
@pytest.mark.parametrize("parts", [1, 2], ids=["each_batch", "accumulated"])
def test_training_equals_that_of_one_process(ranks, world_size, backend, parts, as_views):
    ranks(world_size, train, backend, parts, as_views)


def overflow_on_the_last_rank():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(network())
    optimizer = fused(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    lrs = []
    for step in range(4):
        optimizer.zero_grad()
        overflow = torch.inf if step == 1 and rank == world_size - 1 else 1.0
        (scaler.scale(loss_of(model, step, rank)) * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        lrs += optimizer.get_last_lr()
    return lrs, optimizer.skipped_steps, [p.detach().clone() for p in model.parameters()]


def test_overflow_on_one_rank_skips_the_step_on_all(ranks):
    first, *others = ranks(2, overflow_on_the_last_rank)
    lrs, skipped, params = first
    assert skipped == 1
    assert lrs[1] == lrs[0] != lrs[2]
    for other_lrs, other_skipped, other_params in others:
        assert (other_lrs, other_skipped) == (lrs, skipped)
        assert all(map(torch.equal, other_params, params))


REFUSED = r"under DistributedDataParallel.*fully_shard\(\)"


def refuse_step_in_backward(backend, wrapped_first):
    rank, single = dist.get_rank(), SingleProcess(dist.get_world_size())
    module = network()
    optimizer = fused(module, backend=backend)
    if wrapped_first:
        model = DistributedDataParallel(module)
        with pytest.raises(RuntimeError, match=REFUSED):
            optimizer.step_in_backward()
    else:
        handle = optimizer.step_in_backward()
        model = DistributedDataParallel(module)
        with pytest.raises(RuntimeError, match=REFUSED):
            loss_of(model, 0, rank).backward()
        handle.remove()
        # Its own backward() has not ended.
        model = DistributedDataParallel(module)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()
        single.step()
        single.assert_same(model, f"at step {step}")


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_step_in_backward_is_refused_before_anything_moves(ranks, backend, wrapped_first):
    """DDP averages the gradients after the hooks: each rank would move by its own."""
    ranks(2, refuse_step_in_backward, backend, wrapped_first)


def wrap_after_the_first_step(backend):
    module = network()
    optimizer = fused(module, backend=backend)
    optimizer.step_in_backward()
    loss_of(module, 0).backward()
    optimizer.step()
    model = DistributedDataParallel(module)
    loss_of(model, 1, dist.get_rank()).backward()
    with pytest.raises(RuntimeError, match=r"again after its update .*DistributedDataParallel"):
        optimizer.step()


def test_ddp_that_begins_later_is_an_error_in_step(ranks, backend):
    ranks(2, wrap_after_the_first_step, backend)


def train_ignored_param_in_backward():
    model = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    parallel = DistributedDataParallel(model)
    optimizer = FusedSGDR([model[0].weight], lr=0.1, T_0=10)
    optimizer.step_in_backward()
    before = model[0].weight.detach().clone()
    loss_of(parallel, 0).backward()
    assert model[0].weight.grad is None
    assert not torch.equal(model[0].weight, before)


def test_parameter_that_ddp_ignores_may_be_updated_in_backward(ranks):
    ranks(2, train_ignored_param_in_backward)
