"""State and gradients whose placements differ from their parameter's."""

import copy

import pytest
import torch
from exact_training import fused
from pair import same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def one_step(backend):
    """A sharded parameter after one step, its optimizer, and its values before the next one."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.arange(6.0).view(3, 2)
    param = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    model = torch.nn.Module()
    model.register_parameter("weight", param)
    optimizer = fused(model, backend=backend)
    param.grad = distribute_tensor(weight.cos(), mesh, [Shard(0)])
    optimizer.step()
    return param, optimizer, mesh


def misplaced_state(backend):
    param, optimizer, _ = one_step(backend)
    state = optimizer.state[param]
    state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=[Replicate()])
    before = param.detach().full_tensor().clone(), state["momentum_buffer"].to_local().clone()
    schedule = copy.deepcopy([optimizer.param_groups[0][key] for key in ("lr", "step", "T_cur")])
    with pytest.raises(
        ValueError, match=r"Shard\(dim=0\).*momentum_buffer.*Replicate.*redistribute"
    ):
        optimizer.step()
    assert same_bits(param.detach().full_tensor(), before[0])
    assert same_bits(state["momentum_buffer"].to_local(), before[1])
    assert schedule == [optimizer.param_groups[0][key] for key in ("lr", "step", "T_cur")]


def test_state_that_is_placed_otherwise_is_an_error_that_changes_nothing(ranks, backend):
    ranks(2, misplaced_state, backend)


def state_of_the_local_shape(backend):
    param, optimizer, _ = one_step(backend)
    state = optimizer.state[param]
    state["momentum_buffer"] = state["momentum_buffer"].to_local().clone()
    before = param.detach().to_local().clone()
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(.*parameter's is \(3, 2\)"):
        optimizer.step()
    assert same_bits(param.detach().to_local(), before)


def test_state_of_one_ranks_shape_is_an_error_that_changes_nothing(ranks, backend):
    ranks(2, state_of_the_local_shape, backend)


def load_misplaced_state(backend):
    param, optimizer, mesh = one_step(backend)
    whole = optimizer.state[param]["momentum_buffer"].full_tensor()
    for placed in (whole, distribute_tensor(whole, mesh, [Shard(1)])):
        saved = optimizer.state_dict()
        saved["state"][0]["momentum_buffer"] = placed
        optimizer.load_state_dict(saved)
        loaded = optimizer.state[param]["momentum_buffer"]
        assert loaded.placements == param.placements
        assert same_bits(loaded.full_tensor(), whole)
        optimizer.step()


def test_loaded_state_is_placed_like_its_parameter(ranks, backend):
    ranks(2, load_misplaced_state, backend)


def step_with_grad(backend, *placements):
    param, optimizer, mesh = one_step(backend)
    twin, other, _ = one_step(backend)
    whole = torch.arange(6.0).view(3, 2).sin()
    param.grad = distribute_tensor(whole, mesh, [Shard(0)])
    twin.grad = distribute_tensor(whole, mesh, list(placements))
    optimizer.step()
    other.step()
    assert same_bits(param.detach().full_tensor(), twin.detach().full_tensor())


@pytest.mark.parametrize("placement", [Replicate(), Shard(1)], ids=str)
def test_gradient_with_other_placements_is_redistributed(ranks, backend, placement):
    ranks(2, step_with_grad, backend, placement)
