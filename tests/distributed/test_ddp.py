"""DistributedDataParallel: every rank takes the same step."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from exact_training import STEPS, SingleProcess, fused, loss_of, network
from torch.nn.parallel import DistributedDataParallel


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
