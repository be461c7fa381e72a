"""FusedSGDR equals torch.optim.SGD's for-loop with CosineAnnealingWarmRestarts, bit for bit."""

import math

import pytest
import torch
from cases import CHUNK_SIZES, SIZES
from pair import Pair, assert_same, copies_of, give_gradients, make_params

from sgdr_fused import FusedSGDR

# Without hardware fma torch itself computes other bits: see Note [Same bits everywhere].
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"),
    reason="this CPU's torch multiplies and adds in two roundings",
)


def assert_same_trajectory(optimizer, ours, pair, theirs, steps):
    for step in range(steps):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


@pytest.mark.parametrize(
    "schedule",
    [{"T_0": 7, "T_mult": 1}, {"T_0": 5, "T_mult": 2, "eta_min": 1e-3}, {"T_0": 1, "T_mult": 3}],
    ids=["T_mult=1", "T_mult=2", "T_mult=3"],
)
def test_steps_across_many_restarts_equal_the_pair(backend, dtype, schedule):
    ours = make_params([65, 7], dtype)
    theirs = copies_of(ours)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4} | schedule
    optimizer = FusedSGDR(ours, backend=backend, **options)
    assert_same_trajectory(optimizer, ours, Pair(theirs, **options), theirs, 400)
    assert optimizer.cycle >= 6


def test_every_option_equals_the_pair_at_every_size(backend, dtype, sgd_options):
    ours = make_params(SIZES, dtype)
    theirs = copies_of(ours)
    options = {"lr": 0.05, "T_0": 4, "T_mult": 2, "eta_min": 1e-3} | sgd_options
    optimizer = FusedSGDR(ours, backend=backend, **options)
    assert_same_trajectory(optimizer, ours, Pair(theirs, **options), theirs, 30)


def test_every_option_equals_the_pair_for_a_thousand_steps(dtype, sgd_options):
    ours = make_params([33], dtype)
    theirs = copies_of(ours)
    options = {"lr": 0.05, "T_0": 10, "T_mult": 2} | sgd_options
    optimizer = FusedSGDR(ours, backend="native", **options)
    assert_same_trajectory(optimizer, ours, Pair(theirs, **options), theirs, 1000)


def test_every_option_equals_the_pair_around_a_threads_chunk(dtype, sgd_options):
    ours = make_params([*CHUNK_SIZES, 140_001], dtype)  # together above the parallel threshold
    theirs = copies_of(ours)
    options = {"lr": 0.05, "T_0": 3} | sgd_options
    optimizer = FusedSGDR(ours, backend="native", **options)
    assert_same_trajectory(optimizer, ours, Pair(theirs, **options), theirs, 4)


def test_each_size_alone_equals_the_pair(dtype):
    for size in (*SIZES, *CHUNK_SIZES):
        ours = make_params([size], dtype)
        theirs = copies_of(ours)
        options = {"lr": 0.05, "T_0": 3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
        optimizer = FusedSGDR(ours, backend="native", **options)
        assert_same_trajectory(optimizer, ours, Pair(theirs, **options), theirs, 5)


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_decoupled_weight_decay_equals_the_pair_on_shrunken_parameters(backend, dtype, momentum):
    """SGDW: p is multiplied by 1 - lr * weight_decay; the gradient does not change."""
    ours = make_params([*SIZES, 20_011], dtype)
    theirs = copies_of(ours)
    options = {"lr": 0.05, "T_0": 4, "T_mult": 2} | momentum
    optimizer = FusedSGDR(
        ours, weight_decay=0.1, decoupled_weight_decay=True, backend=backend, **options
    )
    pair = Pair(theirs, **options)
    for step in range(15):
        give_gradients(step, ours, theirs)
        optimizer.step()
        with torch.no_grad():
            for param in theirs:
                param.mul_(1 - pair.param_groups[0]["lr"] * 0.1)
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_groups_with_their_own_options_equal_the_pair(backend, dtype):
    sizes = [65, 8, 1003, 17, 0, 257, 1]
    ours = make_params(sizes, dtype)
    theirs = copies_of(ours)

    def groups(params):
        return [
            {"params": params[:2]},
            {"params": params[2:3], "lr": 0.5, "momentum": 0.0, "weight_decay": 0.1},
            {"params": params[3:5], "lr": 0.02, "momentum": 0.8, "nesterov": True},
            {"params": params[5:], "maximize": True, "dampening": 0.5, "momentum": 0.3},
        ]

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "T_0": 6, "T_mult": 2}
    optimizer = FusedSGDR(groups(ours), backend=backend, **options)
    pair = Pair(groups(theirs), **options)
    assert_same_trajectory(optimizer, ours, pair, theirs, 100)


def test_float32_and_float64_in_one_group_equal_the_pair(backend):
    ours = [
        *make_params([65, 16], torch.float32),
        *make_params([33, 9], torch.float64),
        *make_params([257], torch.float32, seed=1),
    ]
    theirs = copies_of(ours)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "T_0": 6}
    optimizer = FusedSGDR(ours, backend=backend, **options)
    assert_same_trajectory(optimizer, ours, Pair(theirs, **options), theirs, 100)


def test_special_values_propagate_as_in_the_pair(backend, dtype, sgd_options):
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45], dtype=dtype)
    ours = make_params([65], dtype)
    theirs = copies_of(ours)
    options = {"lr": 0.05, "T_0": 4} | sgd_options
    optimizer, pair = FusedSGDR(ours, backend=backend, **options), Pair(theirs, **options)
    for step in range(4):
        give_gradients(step, ours, theirs)
        for param in (*ours, *theirs):
            param.grad[13 * step : 13 * step + 6] = values
            param.detach()[13 * step + 6 : 13 * step + 12] = values
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


@pytest.mark.parametrize("nesterov", [False, True])
def test_float32_stays_within_the_rounding_bound_of_float64(backend, nesterov):
    """Compares with a float64 evaluation written out here, independent of torch's and ours.

    With u = 2**-24, each operation rounds by at most u of its result. A step makes at most r = 5
    roundings on a path (decay, momentum's product, its sum, nesterov, update). The buffer's error
    is carried with factor mu < 1, so it settles below r u max|g| / (1 - mu); each step adds
    lr (1 + mu) times that, and a rounding of the parameter, to the parameter's error, of which
    weight decay feeds back a factor of at most 1 + lr wd / (1 - mu). Scalars rounded to float32
    (lr, mu, wd) make one u more for each operation that they are in, hence 2 r.
    """
    steps, lr, mu, decay = 100, 0.05, 0.9, 1e-3
    (param,) = make_params([257])
    optimizer = FusedSGDR(
        [param], lr=lr, momentum=mu, nesterov=nesterov, weight_decay=decay, T_0=30, backend=backend
    )
    exact, buffer = param.detach().double(), None
    largest_grad = largest_param = 0.0
    for step in range(steps):
        rate = lr * (1 + torch.cos(torch.tensor(torch.pi * (step % 30) / 30).double())).item() / 2
        give_gradients(step, [param])
        grad = param.grad.double() + decay * exact
        buffer = grad if buffer is None else mu * buffer + grad
        exact = exact - rate * (grad + mu * buffer if nesterov else buffer)
        largest_grad = max(largest_grad, buffer.abs().max().item(), grad.abs().max().item())
        largest_param = max(largest_param, exact.abs().max().item())
        optimizer.step()

    u = 2.0**-24
    of_buffer = 2 * 5 * u * largest_grad / (1 - mu)
    a_step = u * largest_param + lr * (1 + mu) * of_buffer
    bound = steps * a_step * (1 + lr * decay / (1 - mu)) ** steps
    error = (param.detach().double() - exact).abs().max().item()
    assert 0 < error <= bound
    assert bound < 2e-3 * largest_param  # or it would not notice a wrong term


def test_comparison_fails_for_different_gradients():
    """Otherwise the tests above could not fail."""
    ours, theirs = make_params([65]), make_params([65])
    optimizer = FusedSGDR(ours, lr=0.1, T_0=5, backend="native")
    pair = Pair(theirs, lr=0.1, T_0=5)
    give_gradients(0, ours)
    give_gradients(1, theirs)
    optimizer.step()
    pair.step()
    with pytest.raises(AssertionError, match="parameter 0 differs"):
        assert_same(optimizer, ours, pair, theirs)
