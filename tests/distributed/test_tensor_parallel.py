"""Tensor parallel: layers cut by columns and by rows, alone and with FSDP2 on top."""

import torch.distributed as dist
from exact_training import STEPS, SingleProcess, fused, loss_of, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


def train(backend, copies=1):
    world_size = dist.get_world_size()
    mesh = init_device_mesh(
        "cpu", (copies, world_size // copies), mesh_dim_names=("data", "tensor")
    )
    single = SingleProcess(copies)
    model = parallelize_module(
        network(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    if copies > 1:
        fully_shard(model, mesh=mesh["data"])
    optimizer = fused(model, backend=backend)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, mesh["data"].get_local_rank()).backward()
        optimizer.step()
        single.step()
        single.assert_same(model, f"at step {step}")


def test_training_equals_that_of_one_process(ranks, world_size, backend):
    ranks(world_size, train, backend)


def test_training_in_two_dimensions_equals_that_of_one_process(ranks, backend):
    ranks(4, train, backend, copies=2)
