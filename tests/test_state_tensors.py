"""The tensors in optimizer.state are ordinary tensors, whatever a user does with them."""

import copy
import gc
import io
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
from pair import give_gradients, make_params

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "T_0": 3, "ema_decay": 0.9}
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 1003, 1024, 1025, 5000)


def make(backend="native", sizes=SIZES, **options):
    params = make_params(sizes)
    optimizer = FusedSGDR(params, backend=backend, **OPTIONS | options)
    step(optimizer, params, 0)
    return optimizer, params


def step(optimizer, params, seed):
    give_gradients(seed, params)
    optimizer.step()


def tensors_of(optimizer):
    return [tensor for of_param in optimizer.state.values() for tensor in of_param.values()]


def assert_apart(tensors):
    """No byte belongs to two of them."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    for (_, end), (begin, _) in pairwise(spans):
        assert end <= begin


def test_every_state_tensor_has_a_storage_of_its_own():
    optimizer, params = make()
    tensors = tensors_of(optimizer)
    assert_apart([*tensors, *params])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert all(tensor.storage_offset() == 0 for tensor in tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.resize_(4096).fill_(7),
        lambda tensor: tensor.untyped_storage().fill_(7),
        lambda tensor: tensor.untyped_storage().resize_(0),
        lambda tensor: tensor.share_memory_().fill_(7),
    ],
    ids=["resize", "fill_storage", "empty_storage", "share"],
)
def test_change_of_one_state_tensor_leaves_the_others_alone(change):
    optimizer, params = make(sizes=[64] * 3)
    tensors = tensors_of(optimizer)
    before = [tensor.clone() for tensor in tensors]
    change(optimizer.state[params[1]]["momentum_buffer"])
    for i in (0, 1, 3, 4, 5):
        assert torch.equal(tensors[i], before[i])


def saved_size(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return len(file.getvalue())


@pytest.mark.parametrize("size_of", [saved_size, lambda state: len(pickle.dumps(state))])
def test_saved_native_state_is_no_larger_than_the_references(size_of):
    ours, _ = make(sizes=[64] * 100)
    theirs, _ = make("reference", sizes=[64] * 100)
    assert size_of(ours.state_dict()) < 1.01 * size_of(theirs.state_dict())


def test_copied_optimizer_shares_no_memory():
    optimizer, params = make(sizes=[64] * 3)
    twin = copy.deepcopy(optimizer)
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    of_twin = twin.param_groups[0]["params"]
    step(twin, of_twin, 1)
    assert all(map(torch.equal, tensors_of(optimizer), before))
    step(optimizer, params, 1)
    assert all(map(torch.equal, tensors_of(optimizer), tensors_of(twin)))


@pytest.mark.parametrize("role", ["momentum_buffer", "ema"])
@pytest.mark.parametrize("size", [64, 5000])
@pytest.mark.parametrize("whose", ["made by the step", "loaded", "the user's"])
def test_autograd_notices_that_a_state_tensor_was_written(role, size, whose, backend):
    """Saved for backward(), then changed by a step: an error, not a wrong gradient."""
    optimizer, params = make(backend, sizes=[size])
    of_param = optimizer.state[params[0]]
    if whose == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
        of_param = optimizer.state[params[0]]
    elif whose == "the user's":
        of_param[role] = of_param[role].clone()
    weight = torch.ones(size, requires_grad=True)
    loss = (weight * of_param[role]).sum()
    step(optimizer, params, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ema_resumes_when_reenabled(backend):
    optimizer, _ = make(backend, sizes=[64])
    optimizer.param_groups[0]["ema_decay"] = None
    optimizer = copy.deepcopy(optimizer)  # which has not seen the average
    params = optimizer.param_groups[0]["params"]
    step(optimizer, params, 1)
    before = optimizer.state[params[0]]["ema"].clone()
    optimizer.param_groups[0]["ema_decay"] = 0.5
    step(optimizer, params, 2)
    assert torch.equal(optimizer.state[params[0]]["ema"], (before + params[0].detach()) / 2)


def test_state_tensors_have_the_strides_of_their_parameter(backend):
    """So that a step over a channels_last model needs no copies."""
    param = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = FusedSGDR([param], **OPTIONS, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert [tensor.stride() for tensor in tensors_of(optimizer)] == [param.stride()] * 2


@pytest.mark.parametrize("remove", ["pop", "none", "replace"])
def test_tensor_removed_from_the_state_is_freed_at_once(remove, backend):
    """As when the state of a sleeping optimizer is moved elsewhere."""
    optimizer, params = make(backend, sizes=[64, 5000])
    step(optimizer, params, 1)
    removed = [weakref.ref(of["momentum_buffer"]) for of in optimizer.state.values()]
    for of_param in optimizer.state.values():
        if remove == "pop":
            of_param.pop("momentum_buffer")
        else:
            of_param["momentum_buffer"] = torch.ones(3) if remove == "replace" else None
    gc.collect()
    assert [ref() for ref in removed] == [None, None]


def test_step_in_backward_accepts_other_averages_in_the_loss(backend):
    """Their versions are counted apart: a parameter's step does not touch them."""
    first, second = torch.ones(64, requires_grad=True), torch.ones(64, requires_grad=True)
    optimizer = FusedSGDR([first, second], **OPTIONS, backend=backend)
    first.grad, second.grad = torch.ones(64), torch.ones(64)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step_in_backward()
    before = second.detach().clone()
    inner = (second * optimizer.state[second]["ema"].detach()).relu()
    (inner + first).sum().backward()
    assert not torch.equal(second, before)


def test_state_tensor_with_new_data_is_used(backend):
    optimizer, params = make(backend, sizes=[64])
    twin = copy.deepcopy(optimizer)
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    buffer.data = buffer.detach().clone()
    of_twin = twin.param_groups[0]["params"]
    for seed in range(1, 4):
        step(optimizer, params, seed)
        step(twin, of_twin, seed)
    assert optimizer.state[params[0]]["momentum_buffer"] is buffer
    assert torch.equal(params[0], of_twin[0])
    assert torch.equal(buffer, twin.state[of_twin[0]]["momentum_buffer"])


@pytest.mark.parametrize("of", ["param", "momentum_buffer", "ema"])
@pytest.mark.parametrize("size", [64, 5000])
def test_lazy_clone_keeps_its_values(of, size, backend):
    """Copy on write: the clone shares the memory until the step writes."""
    optimizer, params = make(backend, sizes=[size])
    tensor = params[0].detach() if of == "param" else optimizer.state[params[0]][of]
    clone = torch._lazy_clone(tensor)
    before = tensor.clone()
    step(optimizer, params, 1)
    assert torch.equal(clone, before)
    assert not torch.equal(tensor, before)


@pytest.mark.parametrize("role", ["momentum_buffer", "ema"])
def test_swapped_state_is_followed(role, backend):
    """torch.utils.swap_tensors, which refuses a tensor with a weak reference to it."""
    optimizer, params = make(backend, sizes=[64])
    for seed in (1, 2):
        step(optimizer, params, seed)
    twin = copy.deepcopy(optimizer)
    tensor = optimizer.state[params[0]][role]
    of_twin = twin.param_groups[0]["params"]
    other = torch.full([64], 2.0)
    torch.utils.swap_tensors(tensor, other)
    twin.state[of_twin[0]][role].fill_(2.0)
    step(optimizer, params, 3)
    step(twin, of_twin, 3)
    assert optimizer.state[params[0]][role] is tensor
    assert torch.equal(params[0], of_twin[0])
    assert torch.equal(tensor, twin.state[of_twin[0]][role])


def test_swapped_parameters_are_followed(backend):
    """torch.utils.swap_tensors, by which module.to() may exchange what a parameter is."""
    optimizer, params = make(backend, sizes=[64, 64])
    step(optimizer, params, 1)
    for param in params:
        param.grad = None
    other = torch.full([64], 2.0, requires_grad=True)
    torch.utils.swap_tensors(params[0], other)
    assert params[0][0].item() == 2
    kept = other.detach().clone()
    step(optimizer, params, 2)
    assert torch.equal(other, kept)
    assert params[0][0].item() != 2
