"""momentum_dtype, stochastic_rounding, master_weights and their random numbers."""

import math

import pytest
import torch
from pair import (
    assert_same_state,
    copies_of,
    draw,
    give_gradients,
    make_params,
    momentum_of,
    same_bits,
)

from sgdr_fused import FusedSGDR
from sgdr_fused.reference.rounding import (
    RandomKey,
    Rounded,
    random_bits,
    round_stochastically,
)

OPTIONS = {"lr": 0.1, "momentum": 0.9, "T_0": 5}
# Around a draw of 64 elements, a block of 1024 and a thread's chunk.
SIZES = (1, 7, 8, 9, 63, 64, 65, 1003, 1023, 1024, 1025, 16385)


def both(params, **options):
    """The native step and the reference on equal parameters."""
    twins = copies_of(params)
    native = FusedSGDR(params, **OPTIONS | options, backend="native")
    return native, FusedSGDR(twins, **OPTIONS | options, backend="reference"), twins


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounded_momentum_equals_the_reference(half_dtype, param_dtype):
    params = make_params(SIZES, param_dtype)
    native, reference, twins = both(params, momentum_dtype=half_dtype)
    for step in range(7):
        give_gradients(step, params, twins)
        native.step()
        reference.step()
        assert momentum_of(native, params[0]).dtype == half_dtype
        assert_same_state(native, params, reference, twins, f"after step {step}")


def test_rounded_parameters_equal_the_reference(half_dtype):
    params = make_params(SIZES, half_dtype)
    native, reference, twins = both(params, stochastic_rounding=True, seed=2**63 + 5)
    for step in range(7):
        give_gradients(step, params, twins)
        native.step()
        reference.step()
        assert_same_state(native, params, reference, twins, f"after step {step}")


def test_master_weights_equal_float32_training_with_a_rounded_copy(backend, half_dtype):
    params = make_params(SIZES, half_dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = FusedSGDR(params, **OPTIONS, master_weights=True, backend=backend)
    in_full = FusedSGDR(full, **OPTIONS, backend=backend)
    for step in range(7):
        give_gradients(step, params)
        for p, q in zip(params, full, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        in_full.step()
        for p, q in zip(params, full, strict=True):
            assert same_bits(optimizer.state[p]["master_param"], q.detach())
            assert same_bits(momentum_of(optimizer, p), momentum_of(in_full, q))
            assert same_bits(p.detach(), q.detach().to(half_dtype))


def test_full_precision_parameters_get_no_master_weights(backend):
    params = make_params([7])
    optimizer = FusedSGDR(params, **OPTIONS, master_weights=True, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"momentum_buffer"}


@pytest.mark.parametrize("layout_of", ["channels_last", "transposed", "every_second", "cropped"])
def test_stochastic_rounding_of_any_layout_equals_the_reference(half_dtype, layout_of):
    from cases import LAYOUTS

    values = draw((3, 5, 4, 6), half_dtype, torch.Generator().manual_seed(1))
    params = [torch.nn.Parameter(LAYOUTS[layout_of](values))]
    twins = [torch.nn.Parameter(LAYOUTS[layout_of](values))]
    options = OPTIONS | {"stochastic_rounding": True}
    native = FusedSGDR(params, **options, backend="native")
    reference = FusedSGDR(twins, **options, backend="reference")
    for step in range(4):
        give_gradients(step, params, twins)
        native.step()
        reference.step()
        assert_same_state(native, params, reference, twins, f"after step {step}")


def test_stochastic_rounding_resumes_bit_for_bit(backend, half_dtype):
    params = make_params([70, 1003], half_dtype)
    options = OPTIONS | {"stochastic_rounding": True, "seed": 7, "backend": backend}
    optimizer = FusedSGDR(params, **options)
    for step in range(6):
        give_gradients(step, params)
        optimizer.step()
    resumed = copies_of(params)
    other = FusedSGDR(resumed, **options)
    other.load_state_dict(optimizer.state_dict())
    for step in range(6, 14):
        give_gradients(step, params, resumed)
        optimizer.step()
        other.step()
    assert_same_state(optimizer, params, other, resumed)


def test_another_seed_rounds_differently(backend):
    results = []
    for seed in (0, 1):
        params = make_params([300], torch.bfloat16)
        optimizer = FusedSGDR(
            params, **OPTIONS, stochastic_rounding=True, seed=seed, backend=backend
        )
        give_gradients(0, params)
        optimizer.step()
        results.append(params[0].detach())
    assert not same_bits(*results)


def test_random_bits_match_philoxs_known_answer():
    """Random123's known answer for a key and a counter of zeros."""
    words = random_bits(RandomKey(0, 0, 0), Rounded.PARAM, 8).tolist()
    answer = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert words == [half for word in answer for half in (word & 0xFFFF, word >> 16)]


def test_random_bits_are_uniform_and_independent():
    key = RandomKey(3, 5, 2)
    n = 1 << 20
    bits = random_bits(key, Rounded.PARAM, n)
    assert int(bits.min()) == 0
    assert int(bits.max()) == 65535
    mean = float(bits.double().mean()) / 65535
    assert abs(mean - 0.5) < 5 / math.sqrt(12 * n)
    ones = torch.stack([bits >> i & 1 for i in range(16)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 5 / math.sqrt(4 * n)
    for other in (key._replace(seed=4), key._replace(step=6), key._replace(param_index=1)):
        same = (random_bits(other, Rounded.PARAM, n) == bits).double().mean()
        assert same < 2e-4  # 1 in 65536 by chance
    assert (random_bits(key, Rounded.MOMENTUM_BUFFER, n) == bits).double().mean() < 2e-4


def test_rounding_is_unbiased(half_dtype):
    """The mean over all 65536 values of the bits is the value itself, exactly or to a bit."""
    bits = torch.arange(65536)
    for value in (1.0001, -3.14159, 6.1e-5, 3.3e-6, -7.7e-8, 1e-30, 65503.9, 0.0, -1.0):
        rounded = round_stochastically(torch.full((65536,), value), half_dtype, bits)
        mean = float(rounded.double().mean())
        exact = float(torch.tensor(value))
        below, above = float(rounded.min()), float(rounded.max())
        # What float16 loses below the 13 bits that it goes by, where its numbers lie 2^-24 apart.
        lost = 2**-37 if half_dtype == torch.float16 else 0.0
        assert below - lost <= exact <= above + lost
        # Less than one of the 65536 values amiss.
        assert abs(mean - exact) <= (above - below) * 2**-17 + lost
        neighbours = torch.unique(rounded.view(torch.int16))
        assert len(neighbours) <= 2


def test_representable_values_are_not_rounded(half_dtype):
    representable = torch.arange(-32768, 32768).to(torch.int16).view(half_dtype)
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        rounded = round_stochastically(
            representable.float(), half_dtype, torch.full((65536,), bits)
        )
        assert same_bits(rounded, representable)


def test_stochastic_rounding_does_not_lose_small_updates(backend):
    """Each update is 2^-12 of the value, which rounding to nearest drops."""
    stuck, moved = (torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    options = {"lr": 2**-12, "T_0": 10**9, "backend": backend}
    plain = FusedSGDR([stuck], **options)
    rounded = FusedSGDR([moved], **options, stochastic_rounding=True)
    for _ in range(64):
        stuck.grad = moved.grad = torch.ones(4096, dtype=torch.bfloat16)
        plain.step()
        rounded.step()
    assert stuck.eq(1).all()
    # Each element has moved by 2^-8 with probability 1/16, 64 times.
    deviation = 2**-8 * math.sqrt(64 * (1 / 16) * (15 / 16) / 4096)
    mean = float(moved.detach().double().mean())
    assert mean == pytest.approx(1 - 64 / 4096, abs=5 * deviation)


def test_half_precision_momentum_is_unbiased(backend, half_dtype):
    """The mean over many elements stays close to the buffer in full precision."""
    params = [torch.nn.Parameter(torch.zeros(1 << 16))]
    optimizer = FusedSGDR(
        params, lr=0.0, momentum=0.99, T_0=10, momentum_dtype=half_dtype, backend=backend
    )
    buffer = largest = 0.0
    for step in range(40):
        grad = math.sin(step + 1) + 1e-3
        params[0].grad = torch.full((1 << 16,), grad)
        optimizer.step()
        buffer = 0.99 * buffer + grad
        largest = max(largest, abs(buffer))
    mean = float(momentum_of(optimizer, params[0]).double().mean())
    # 40 roundings of each element, whose deviation is half of the distance of two numbers at most.
    deviation = largest * torch.finfo(half_dtype).eps / 2 * math.sqrt(40 / (1 << 16))
    assert mean == pytest.approx(buffer, abs=5 * deviation)


@pytest.mark.parametrize("value", [torch.int8, "bfloat16", torch.complex64, 16])
def test_momentum_dtype_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match="Invalid momentum_dtype value"):
        FusedSGDR(make_params([4]), **OPTIONS, momentum_dtype=value)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, None])
def test_seed_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match="Invalid seed value"):
        FusedSGDR(make_params([4]), **OPTIONS, seed=value)


def test_stochastic_rounding_with_master_weights_is_an_error():
    with pytest.raises(ValueError, match="set one of the two"):
        FusedSGDR(make_params([4]), **OPTIONS, stochastic_rounding=True, master_weights=True)


def test_momentum_dtype_of_complex_parameters_is_an_error(backend):
    params = make_params([4], torch.complex64)
    optimizer = FusedSGDR(params, **OPTIONS, momentum_dtype=torch.bfloat16, backend=backend)
    before = params[0].detach().clone()
    give_gradients(0, params)
    with pytest.raises(ValueError, match="is for real parameters"):
        optimizer.step()
    assert same_bits(params[0].detach(), before)


def test_momentum_dtype_may_change_between_steps(backend):
    params = make_params([70])
    optimizer = FusedSGDR(params, **OPTIONS, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["momentum_dtype"] = torch.bfloat16
    optimizer.load_state_dict(saved)
    assert momentum_of(optimizer, params[0]).dtype == torch.bfloat16
    give_gradients(1, params)
    optimizer.step()
    assert momentum_of(optimizer, params[0]).dtype == torch.bfloat16
