"""Tensor parallel: layers cut by columns and by rows, alone and with FSDP2 on top."""

import math

import torch.distributed as dist
from exact_training import STEPS, SingleProcess, fused, loss_of, network
from pair import copies_of, give_gradients, make_params
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from sgdr_fused import FusedSGDR


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


def clip_over_two_dimensions(backend):
    """Each parameter is cut along dimensions of the mesh of its own."""
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [[Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(1)]]
    whole = make_params([(6, 4), (4, 6), (8, 2)])
    ours = [
        nn.Parameter(distribute_tensor(param.detach(), mesh, at))
        for param, at in zip(copies_of(whole), placements, strict=True)
    ]
    options = {"lr": 0.1, "T_0": 3, "max_grad_norm": 1.0, "backend": backend}
    sharded, single = FusedSGDR(ours, **options), FusedSGDR(whole, **options)
    give_gradients(0, whole)
    for param, plain, at in zip(ours, whole, placements, strict=True):
        param.grad = distribute_tensor(plain.grad, mesh, at)
    sharded.step()
    single.step()
    assert math.isclose(float(sharded.grad_norm), float(single.grad_norm), rel_tol=1e-13)


def test_norm_counts_every_shard_once_whatever_dimensions_it_is_cut_along(ranks, backend):
    ranks(4, clip_over_two_dimensions, backend)
