"""Half precision and mixed dtypes: native and reference agree to the bit.

torch rounds to half precision after every operation, so the pair cannot be compared with; the
reference computes in float32 and rounds once.
"""

import itertools
import math

import pytest
import torch
from cases import HALF_PRECISION, SIZES
from pair import assert_same, copies_of, draw, give_gradients, make_params, momentum_of, same_bits

from sgdr_fused import FusedSGDR

ALL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "T_0": 3}


def both_backends(params, **options):
    """An optimizer of each backend, with its parameters."""
    other = copies_of(params)
    options = OPTIONS | options
    return (
        (FusedSGDR(params, backend="native", **options), params),
        (FusedSGDR(other, backend="reference", **options), other),
    )


def assert_same_steps(native_side, reference_side, steps, before_each=None):
    for step in range(steps):
        give_gradients(step, native_side[1], reference_side[1])
        for _, params in (native_side, reference_side):
            if before_each is not None:
                before_each(step, params)
        native_side[0].step()
        reference_side[0].step()
        assert_same(*native_side, *reference_side, f"after step {step}")


def test_every_option_equals_the_reference_at_every_size(half_dtype, any_options):
    params = make_params(SIZES, half_dtype)
    reset = {"momentum": 0, "nesterov": False, "weight_decay": 0}
    assert_same_steps(*both_backends(params, **reset | any_options), 10)


def test_half_precision_equals_the_reference_for_many_steps(half_dtype):
    params = make_params([33, 257], half_dtype)
    assert_same_steps(*both_backends(params, T_mult=2), 300)


def test_half_precision_equals_the_reference_around_a_threads_chunk(half_dtype):
    params = make_params([16383, 16384, 16385, 300_001], half_dtype)
    assert_same_steps(*both_backends(params), 3)


def test_reference_computes_in_float32_and_rounds_once(half_dtype):
    """Compares one step with the formula in float64."""
    (param,) = make_params([257], half_dtype)
    lr, mu, decay = (torch.tensor(x, dtype=torch.float32) for x in (0.05, 0.9, 1e-2))
    optimizer = FusedSGDR([param], backend="reference", **OPTIONS)
    give_gradients(0, [param])
    exact, grad = param.detach().double(), param.grad.double()
    grad = grad + decay.double() * exact
    buffer = grad
    expected = exact - lr.double() * (grad + mu.double() * buffer)
    optimizer.step()
    # Half an ulp of half precision, and far less from the float32 operations before.
    ulp = expected.abs() * torch.finfo(half_dtype).eps
    assert ((param.detach().double() - expected).abs() <= 0.51 * ulp).all()


def test_update_smaller_than_half_an_ulp_is_rounded_to_nearest_even(backend, half_dtype):
    """p - lr g lies exactly between two numbers: the one with an even mantissa is taken."""
    eps = torch.finfo(half_dtype).eps
    values = torch.tensor([1.0, 1 + eps, 1 + 2 * eps, 1 + 3 * eps] * 9, dtype=half_dtype)
    param = torch.nn.Parameter(values)
    param.grad = torch.full_like(param, -eps / 2)
    optimizer = FusedSGDR([param], lr=1.0, T_0=1000, backend=backend)
    optimizer.step()
    rounded = torch.tensor([1.0, 1 + 2 * eps, 1 + 2 * eps, 1 + 4 * eps] * 9, dtype=half_dtype)
    assert same_bits(param.detach(), rounded)


def test_special_values_equal_the_reference(half_dtype, any_options):
    finfo = torch.finfo(half_dtype)
    special = [
        *(0.0, -0.0, math.inf, -math.inf, math.nan),
        *(finfo.max, finfo.min, finfo.tiny, -finfo.tiny),
        *(finfo.smallest_normal / 4, -finfo.smallest_normal / 2, finfo.eps, 1.0),
    ]
    pairs = torch.tensor(list(itertools.product(special, special)), dtype=torch.float64)
    param = torch.nn.Parameter(pairs[:, 0].to(half_dtype))
    reset = {"momentum": 0, "nesterov": False, "weight_decay": 0}
    sides = both_backends([param], **reset | any_options)
    for step in range(4):
        for optimizer, params in sides:
            params[0].grad = pairs[:, 1].roll(step).to(half_dtype)
            optimizer.step()
        assert_same(*sides[0], *sides[1], f"after step {step}")


def test_overflowing_parameter_becomes_infinite(backend, half_dtype):
    largest = torch.finfo(half_dtype).max
    param = torch.nn.Parameter(torch.full([33], largest, dtype=half_dtype))
    param.grad = torch.full_like(param, -largest)
    FusedSGDR([param], lr=0.5, T_0=3, backend=backend).step()
    assert (param == math.inf).all()


def test_subnormal_parameters_are_not_flushed_to_zero(backend, half_dtype):
    smallest = torch.finfo(half_dtype).smallest_normal
    param = torch.nn.Parameter(torch.full([33], smallest / 4, dtype=half_dtype))
    param.grad = torch.full_like(param, -smallest / 4)
    FusedSGDR([param], lr=1.0, T_0=3, backend=backend).step()
    assert (param == smallest / 2).all()


def test_one_group_may_mix_dtypes(any_options):
    params = [
        param
        for i, dtype in enumerate((*ALL_DTYPES, *reversed(ALL_DTYPES)))
        for param in make_params([33, 8], dtype, seed=i)
    ]
    reset = {"momentum": 0, "nesterov": False, "weight_decay": 0}
    assert_same_steps(*both_backends(params, **reset | any_options), 8)


@pytest.mark.parametrize("grad_dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", ALL_DTYPES, ids=str)
def test_gradient_may_have_another_dtype(param_dtype, grad_dtype):
    sides = both_backends(make_params([257, 33, 1], param_dtype))
    for step in range(5):
        for optimizer, params in sides:
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad_dtype = grad_dtype
                param.grad = draw(param.shape, grad_dtype, generator)
            optimizer.step()
        assert_same(*sides[0], *sides[1], f"after step {step}")
    optimizer, params = sides[0]
    assert momentum_of(optimizer, params[0]).dtype == param_dtype


@pytest.mark.parametrize("momentum_dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", ALL_DTYPES, ids=str)
def test_momentum_buffer_keeps_its_own_dtype(param_dtype, momentum_dtype):
    sides = both_backends(make_params([257, 33, 1], param_dtype))

    def convert(step, side):
        if step != 2:
            return
        optimizer = next(o for o, params in sides if params is side)
        for param in side:
            buffer = optimizer.state[param]["momentum_buffer"].to(momentum_dtype)
            optimizer.state[param]["momentum_buffer"] = buffer

    assert_same_steps(*sides, 6, convert)
    assert momentum_of(sides[0][0], sides[0][1][0]).dtype == momentum_dtype


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_misaligned_half_precision_parameter_is_updated(half_dtype, offset):
    (dense,) = make_params([257], half_dtype)
    room = torch.zeros(offset + 257, dtype=half_dtype)
    room[offset:] = dense.detach()
    ours = room[offset:].requires_grad_()
    native_side, reference_side = both_backends([dense])
    native_side = (FusedSGDR([ours], backend="native", **OPTIONS), [ours])
    assert_same_steps(native_side, reference_side, 4)
    assert (room[:offset] == 0).all()


@pytest.mark.parametrize("dtype", HALF_PRECISION, ids=str)
def test_training_in_half_precision_learns(backend, dtype):
    """Training finds a mean to the precision of the dtype."""
    param = torch.nn.Parameter(torch.zeros(33, dtype=dtype))
    target = torch.linspace(-1, 1, 33).to(dtype)
    optimizer = FusedSGDR([param], lr=0.5, momentum=0.5, T_0=50, backend=backend)
    for _ in range(50):
        optimizer.zero_grad()
        (param - target).square().mul(0.5).sum().backward()
        optimizer.step()
    assert ((param - target).abs() <= torch.finfo(dtype).eps).all()
