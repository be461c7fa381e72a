"""Any strides, offsets and shapes of parameter, gradient and momentum give the same numbers.

The pair has the same values in dense tensors, whose memory order cannot mislead it.
"""

import itertools

import pytest
import torch
from cases import LAYOUTS, SGD_OPTIONS
from pair import (
    Pair,
    assert_same,
    assert_same_state,
    copies_of,
    draw,
    give_gradients,
    make_params,
    same_bits,
)

from sgdr_fused import FusedSGDR

SHAPE = (4, 3, 5, 18)
OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "T_0": 3}


def leaf(tensor):
    return tensor.detach().requires_grad_()


# Every layout of one tensor with every layout of another.
PAIRS_OF_LAYOUTS = list(itertools.product(LAYOUTS.values(), repeat=2))


def lay_out_params(dtype):
    """Dense parameters, and the same values in a parameter of each pair's first layout."""
    dense = make_params([SHAPE] * len(PAIRS_OF_LAYOUTS), dtype)
    return dense, [
        leaf(of_param(p)) for (of_param, _), p in zip(PAIRS_OF_LAYOUTS, dense, strict=True)
    ]


def lay_out_grads(dense, ours):
    """Gives each parameter its dense twin's gradient in its pair's second layout."""
    for (_, of_grad), theirs, param in zip(PAIRS_OF_LAYOUTS, dense, ours, strict=True):
        param.grad = of_grad(theirs.grad)


def test_every_layout_of_parameter_and_gradient_equals_the_pair(backend, dtype):
    dense, ours = lay_out_params(dtype)
    before = [(p.stride(), p.untyped_storage().nbytes()) for p in ours]
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(dense, **OPTIONS)
    for step in range(7):
        give_gradients(step, dense)
        lay_out_grads(dense, ours)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, dense, f"after step {step}")
        for param, theirs in zip(ours, dense, strict=True):
            assert torch.equal(param.grad, theirs.grad), "the gradient is only read"
    assert [(p.stride(), p.untyped_storage().nbytes()) for p in ours] == before


def test_every_layout_in_half_precision_equals_the_reference(backend, half_dtype):
    dense, ours = lay_out_params(half_dtype)
    optimizer = FusedSGDR(ours, backend=backend, **OPTIONS)
    expected = FusedSGDR(dense, backend="reference", **OPTIONS)
    for step in range(4):
        give_gradients(step, dense)
        lay_out_grads(dense, ours)
        optimizer.step()
        expected.step()
        assert_same(optimizer, ours, expected, dense, f"after step {step}")


def test_single_parameter_of_any_layout_is_updated(backend, layout):
    """No other parameter of the step influences how it is read."""
    (dense,) = make_params([SHAPE])
    ours = leaf(layout(dense.detach()))
    optimizer, pair = FusedSGDR([ours], backend=backend, **OPTIONS), Pair([dense], **OPTIONS)
    for step in range(4):
        give_gradients(step, [dense])
        ours.grad = layout(dense.grad)
        optimizer.step()
        pair.step()
        assert_same(optimizer, [ours], pair, [dense], f"after step {step}")


def test_momentum_buffer_of_any_layout_is_used_in_place(backend):
    """A buffer may come from elsewhere, such as the state_dict of a contiguous model."""
    dense, ours = lay_out_params(torch.float32)
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(dense, **OPTIONS)
    buffers = []
    for step in range(5):
        give_gradients(step, dense, ours)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, dense, f"after step {step}")
        if step == 1:
            for (_, of_buffer), param in zip(PAIRS_OF_LAYOUTS, ours, strict=True):
                of_param = optimizer.state[param]
                of_param["momentum_buffer"] = of_buffer(of_param["momentum_buffer"])
                buffers.append(of_param["momentum_buffer"])
    for param, buffer in zip(ours, buffers, strict=True):
        assert optimizer.state[param]["momentum_buffer"] is buffer


def test_master_weights_of_elements_at_one_address_are_an_error(backend):
    memory = torch.ones(9, dtype=torch.bfloat16)
    param = leaf(memory.expand(7, 9))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGDR([param], backend=backend, master_weights=True, **OPTIONS)
    with pytest.raises(RuntimeError, match="one memory address"):
        optimizer.step()
    assert (memory == 1).all()
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("role", ["ema", "master_param"])
def test_average_or_master_weights_of_any_layout_are_used_in_place(backend, layout, role):
    params = make_params([SHAPE], torch.bfloat16)
    twins = copies_of(params)
    options = OPTIONS | {"ema_decay": 0.9, "master_weights": True}
    optimizer = FusedSGDR(params, backend=backend, **options)
    expected = FusedSGDR(twins, backend="reference", **options)
    for step in range(4):
        give_gradients(step, params, twins)
        optimizer.step()
        expected.step()
        assert_same_state(optimizer, params, expected, twins, f"after step {step}")
        if step == 1:
            of_param = optimizer.state[params[0]]
            of_param[role] = tensor = layout(of_param[role])
    assert optimizer.state[params[0]][role] is tensor


def test_memory_between_the_elements_is_left_alone(backend, layout):
    (dense,) = make_params([SHAPE])
    ours = leaf(layout(dense.detach()))
    room = torch.as_strided(ours.detach(), [ours.untyped_storage().nbytes() // 4], [1], 0)
    gap_before = (room == -7).sum()
    optimizer = FusedSGDR([ours], backend=backend, **OPTIONS)
    for step in range(3):
        give_gradients(step, [ours])
        optimizer.step()
    assert (room == -7).sum() == gap_before
    assert int(gap_before) == room.numel() - ours.numel()


def test_gradients_may_be_slices_of_one_bucket(backend, dtype):
    """DDP's gradient_as_bucket_view makes such gradients."""
    ours, theirs = make_params([65, 33], dtype), make_params([65, 33], dtype)
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    bucket = torch.zeros(1 + 65 + 33, dtype=dtype)
    ours[0].grad, ours[1].grad = bucket[1:66], bucket[66:]
    for step in range(4):
        give_gradients(step, theirs)
        bucket[1:] = torch.cat([p.grad for p in theirs])
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_misaligned_parameter_is_updated(backend, dtype):
    """Offsets are 1 to 8 elements."""
    dense = make_params([257] * 8, dtype)
    rooms = [torch.cat([torch.zeros(i, dtype=dtype), p.detach()]) for i, p in enumerate(dense, 1)]
    ours = [leaf(room[i:]) for i, room in enumerate(rooms, 1)]
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(dense, **OPTIONS)
    for step in range(4):
        give_gradients(step, dense, ours)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, dense, f"after step {step}")
    for i, room in enumerate(rooms, 1):
        assert (room[:i] == 0).all(), "memory before the parameter is left alone"


def test_parameters_may_share_one_storage(backend, dtype):
    (whole,) = make_params([66], dtype)
    theirs = [torch.nn.Parameter(half.clone()) for half in whole.detach().split(33)]
    ours = [leaf(half) for half in whole.detach().split(33)]
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(4):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_parameters_of_0_or_1_elements_or_dimensions_are_updated(backend, dtype):
    ours = make_params([(), (0,), (3, 0, 2), (1,), (1, 1, 1), (1, 7, 1), 5], dtype)
    theirs = copies_of(ours)
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(4):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_expanded_gradient_is_read_through_its_strides(backend, dtype):
    """The gradient of sum() has one element in memory."""
    ours, theirs = make_params([(7, 9)], dtype), make_params([(7, 9)], dtype)
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(4):
        ours[0].grad = torch.full((), 0.3 + step, dtype=dtype).expand(7, 9)
        theirs[0].grad = ours[0].grad.contiguous()
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_partly_expanded_gradient_is_read_through_its_strides(backend, dtype):
    ours, theirs = make_params([(7, 9)], dtype), make_params([(7, 9)], dtype)
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(4):
        row = draw([9], dtype, torch.Generator().manual_seed(step))
        ours[0].grad = row.expand(7, 9)
        theirs[0].grad = ours[0].grad.contiguous()
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


@pytest.mark.parametrize("expand", [lambda x: x.expand(7, 9), lambda x: x[:1].expand(9)])
def test_parameter_with_several_elements_at_one_address_is_an_error(backend, expand):
    memory = torch.ones(9)
    param = leaf(expand(memory))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGDR([param], backend=backend, **OPTIONS)
    with pytest.raises(RuntimeError, match="one memory address"):
        optimizer.step()
    assert (memory == 1).all()
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", ["plain", "nesterov_weight_decay", "all"])
def test_complex_parameter_is_updated_as_pairs_of_reals(backend, dtype, name):
    ours = make_params([1, 3, 8, 33], dtype)
    options = {"lr": 0.1, "T_0": 3} | SGD_OPTIONS[name]
    optimizer = FusedSGDR(ours, backend=backend, **options)
    reals = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in ours]
    pair = Pair(reals, **options)
    for step in range(5):
        give_gradients(step, ours)
        for param, real in zip(ours, reals, strict=True):
            real.grad = torch.view_as_real(param.grad).clone()
        optimizer.step()
        pair.step()
        for param, real in zip(ours, reals, strict=True):
            assert same_bits(torch.view_as_real(param.detach()), real.detach()), f"step {step}"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_lazily_conjugated_gradient_is_conjugated(backend, dtype):
    ours, theirs = make_params([(3, 11)], dtype), make_params([(3, 11)], dtype)
    optimizer = FusedSGDR(ours, backend=backend, **OPTIONS)
    expected = FusedSGDR(theirs, backend="reference", **OPTIONS)
    for step in range(4):
        give_gradients(step, ours, theirs)
        ours[0].grad = ours[0].grad.conj()
        assert ours[0].grad.is_conj()
        theirs[0].grad = theirs[0].grad.conj().resolve_conj()
        optimizer.step()
        expected.step()
        assert_same(optimizer, ours, expected, theirs, f"after step {step}")


@pytest.mark.parametrize(
    "negated",
    [lambda numbers: numbers.conj().imag, lambda numbers: torch._neg_view(numbers.real.clone())],
    ids=["imaginary_part_of_conjugate", "contiguous"],
)
def test_lazily_negated_gradient_is_negated(backend, negated):
    """The imaginary part of a conjugate is a view that is yet to be negated."""
    ours, theirs = make_params([33]), make_params([33])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(4):
        ours[0].grad = negated(draw([33], torch.complex64, torch.Generator().manual_seed(step)))
        assert ours[0].grad.is_neg()
        theirs[0].grad = ours[0].grad.resolve_neg().contiguous()
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_strided_complex_parameter_is_updated(backend):
    (dense,) = make_params([(6, 5)], torch.complex64)
    room = torch.full((6, 10), -7, dtype=torch.complex64)
    ours = leaf(room[:, ::2])
    ours.detach().copy_(dense.detach())
    optimizer = FusedSGDR([ours], backend=backend, **OPTIONS)
    expected = FusedSGDR([dense], backend="reference", **OPTIONS)
    for step in range(4):
        give_gradients(step, [dense])
        ours.grad = dense.grad.clone()
        optimizer.step()
        expected.step()
        assert_same(optimizer, [ours], expected, [dense], f"after step {step}")
    assert (room[:, 1::2] == -7).all()
