"""FSDP1, `FullyShardedDataParallel`: several parameters of a module are one flat one."""

import pytest
import torch
import torch.distributed as dist
from exact_training import fused, loss_of, network
from torch.distributed.fsdp import FullyShardedDataParallel


def sharded(use_orig_params):
    return FullyShardedDataParallel(
        network(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def refuse_flat_params():
    optimizer = fused(sharded(use_orig_params=False))
    with pytest.raises(RuntimeError, match=r"is a flat parameter.*fully_shard\(\)"):
        optimizer.step_in_backward()


def test_step_in_backward_refuses_flat_parameters(ranks):
    """Their hooks see one rank's gradient, before it is summed."""
    ranks(2, refuse_flat_params)


def update_original_params(backend):
    ours, usual = sharded(use_orig_params=True), sharded(use_orig_params=True)
    sides = [fused(model, backend=backend) for model in (ours, usual)]
    sides[0].step_in_backward()
    for step in range(4):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            if model is usual:
                optimizer.zero_grad()
            loss_of(model, step, dist.get_rank()).backward()
            optimizer.step()
        assert all(map(torch.equal, ours.parameters(), usual.parameters()))


def test_step_updates_what_has_no_gradient_within_backward(ranks, backend):
    """With use_orig_params the gradients are there only when backward() has ended."""
    ranks(2, update_original_params, backend)
