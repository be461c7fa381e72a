"""max_grad_norm and skip_nonfinite: clipping and skipping by the norm of all gradients."""

import math

import pytest
import torch
from cases import SIZES
from pair import (
    Pair,
    assert_same,
    assert_same_state,
    assert_unchanged,
    copies_of,
    give_gradients,
    make_params,
    make_scaler,
    same_bits,
    snapshot,
)

from sgdr_fused import FusedSGDR
from sgdr_fused.reference.norm import sum_of_squares

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "T_0": 3, "T_mult": 2}
# Around a row of lanes, a chunk and several chunks.
NORM_SIZES = (*SIZES, 127, 128, 129, 4095, 4096, 4097, 8192 + 130, 300_001)


def exact_norm(grads):
    """Correctly rounded except for the final square root."""
    return math.sqrt(math.fsum(float(x) ** 2 for grad in grads for x in grad.double().reshape(-1)))


def test_grad_norm_is_the_norm_of_all_gradients(backend):
    for size in NORM_SIZES:
        params = make_params([size, 5])
        optimizer = FusedSGDR(params, **OPTIONS, max_grad_norm=1.0, backend=backend)
        give_gradients(0, params)
        optimizer.step()
        assert optimizer.grad_norm.dtype == torch.float64
        assert optimizer.grad_norm.shape == ()
        wanted = exact_norm([p.grad for p in params])
        # Each of at most n additions in double rounds once.
        assert abs(float(optimizer.grad_norm) / wanted - 1) <= (size + 5) * 2**-53, size


def uneven_grad(shape, generator):
    """A gradient whose magnitudes differ so much that each addition rounds."""
    scale = torch.randint(-5, 5, shape, generator=generator).double().exp2()
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_norm_equals_the_reference_bit_for_bit(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    for size in (*range(1, 140), 255, 300):
        param = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        param.grad = uneven_grad((size,), generator).to(dtype)
        optimizer = FusedSGDR([param], **OPTIONS, max_grad_norm=1.0, backend=backend)
        optimizer.step()
        expected = math.sqrt(sum_of_squares([param.grad]))
        assert float(optimizer.grad_norm) == expected, f"{size} elements"


def test_norm_of_any_layout_equals_the_reference(layout):
    """Both add in the order of the parameter's memory."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        grad = uneven_grad((4, 3, 5, 18), generator)
        norms = []
        for backend in ("native", "reference"):
            param = torch.nn.Parameter(layout(torch.zeros_like(grad)))
            param.grad = grad.clone()
            optimizer = FusedSGDR([param], **OPTIONS, max_grad_norm=1.0, backend=backend)
            optimizer.step()
            norms.append(optimizer.grad_norm)
        assert same_bits(*norms)


def test_gradients_are_clipped_as_by_clip_grad_norm(backend):
    ours = make_params([10, 300, 1])
    theirs = copies_of(ours)
    optimizer = FusedSGDR(ours, **OPTIONS, max_grad_norm=0.5, backend=backend)
    pair = Pair(theirs, **OPTIONS)
    for step in range(9):
        give_gradients(step, ours, theirs)
        given = [p.grad.clone() for p in ours]
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        pair.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, check_dtype=False)
        torch.testing.assert_close(ours, theirs)
        assert all(same_bits(p.grad, grad) for p, grad in zip(ours, given, strict=True))


@pytest.mark.parametrize("max_grad_norm", [1e-7, 1e-6, 3e-6])
def test_tiny_gradients_are_clipped_as_by_clip_grad_norm(backend, max_grad_norm):
    """clip_grad_norm_ adds 1e-6 to the norm, which is visible if the norm is about as small."""
    ours, theirs = ([torch.nn.Parameter(torch.zeros(size)) for size in (10, 300)] for _ in range(2))
    optimizer = FusedSGDR(ours, lr=0.5, T_0=3, max_grad_norm=max_grad_norm, backend=backend)
    give_gradients(0, ours, theirs)
    for param in (*ours, *theirs):
        param.grad *= 2e-6 / 20
    torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
    optimizer.step()
    # torch rounds the norm, the coefficient and the product to float32.
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.detach(), -0.5 * their.grad, rtol=4 * 2**-23, atol=0)


def test_gradients_below_the_limit_are_not_clipped(backend):
    ours = make_params([10, 300])
    theirs = copies_of(ours)
    optimizer = FusedSGDR(ours, **OPTIONS, max_grad_norm=1e6, backend=backend)
    pair = Pair(theirs, **OPTIONS)
    for step in range(9):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


def test_norm_spans_all_groups_and_dtypes(backend):
    params = [
        *make_params([4, 70]),
        *make_params([9], torch.float64),
        *make_params([33], torch.bfloat16),
        *make_params([17], torch.float16),
        *make_params([8], torch.complex64),
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01, "maximize": True}]
    optimizer = FusedSGDR(groups, **OPTIONS, max_grad_norm=1.0, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    flat = [torch.view_as_real(p.grad) if p.is_complex() else p.grad for p in params]
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm(flat), rel=1e-14, abs=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_unscaled_before_clipping(backend, maximize):
    ours, scaled = make_params([10, 300]), make_params([10, 300])
    options = OPTIONS | {"max_grad_norm": 0.5, "maximize": maximize, "backend": backend}
    optimizer, with_scaler = FusedSGDR(ours, **options), FusedSGDR(scaled, **options)
    scaler = make_scaler(1024.0)
    for step in range(7):
        give_gradients(step, ours, scaled)
        for p in scaled:
            p.grad *= 1024
        optimizer.step()
        scaler.step(with_scaler)
        scaler.update()
        assert same_bits(optimizer.grad_norm, with_scaler.grad_norm)
        assert_same(optimizer, ours, with_scaler, scaled)


def test_norm_does_not_depend_on_the_number_of_threads():
    params = make_params([1 << 20, 70, 300_001])
    optimizer = FusedSGDR(params, **OPTIONS, max_grad_norm=1.0, backend="native")
    norms = []
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            give_gradients(0, params)
            optimizer.step()
            norms.append(optimizer.grad_norm)
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(norm, norms[0]) for norm in norms)
    assert float(norms[0]) == math.sqrt(sum_of_squares([p.grad for p in params]))


def test_squares_of_large_gradients_do_not_overflow(backend):
    params = make_params([3])
    optimizer = FusedSGDR(params, **OPTIONS, max_grad_norm=1.0, backend=backend)
    params[0].grad = torch.full((3,), 3e38)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(3e38 * math.sqrt(3), rel=1e-6)
    assert params[0].isfinite().all()


def test_infinite_norm_clips_as_clip_grad_norm_does(backend):
    ours = make_params([5])
    theirs = copies_of(ours)
    optimizer = FusedSGDR(ours, **OPTIONS, max_grad_norm=1.0, backend=backend)
    pair = Pair(theirs, **OPTIONS)
    give_gradients(0, ours, theirs)
    ours[0].grad[1] = theirs[0].grad[1] = math.inf
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    optimizer.step()
    pair.step()
    assert_same(optimizer, ours, pair, theirs)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("first_good", [0, 2])
def test_step_with_a_nonfinite_gradient_changes_nothing(backend, bad, first_good):
    params = make_params([10, 5000])
    options = OPTIONS | {"ema_decay": 0.5, "skip_nonfinite": True, "backend": backend}
    optimizer = FusedSGDR(params, **options)
    for step in range(first_good):
        give_gradients(step, params)
        optimizer.step()
    before = snapshot(optimizer, params)
    give_gradients(first_good, params)
    params[1].grad[4999] = bad
    optimizer.step()
    assert_unchanged(before, optimizer, params)
    assert optimizer.skipped_steps == 1
    assert not math.isfinite(float(optimizer.grad_norm))


@pytest.mark.parametrize("grad", [1.0, 0.0])
@pytest.mark.parametrize("grad_scale", [0.0, math.nan])
def test_step_with_a_scale_that_makes_finite_gradients_nonfinite_is_skipped(
    backend, grad, grad_scale
):
    """The reference raised ZeroDivisionError, and a GPU took the step."""
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, skip_nonfinite=True, backend=backend)
    params[0].grad = torch.full((4,), grad)
    before = snapshot(optimizer, params)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(grad_scale), torch.tensor(0.0)
    optimizer.step()
    assert_unchanged(before, optimizer, params)
    assert optimizer.skipped_steps == 1
    assert math.isinf(float(optimizer.grad_norm)) == (grad == 1 and grad_scale == 0)


def test_skipped_steps_leave_no_trace(backend):
    clean, hit = make_params([10, 300]), make_params([10, 300])
    options = OPTIONS | {"ema_decay": "swa", "backend": backend}
    without = FusedSGDR(clean, **options)
    protected = FusedSGDR(hit, **options, skip_nonfinite=True)
    for step in range(12):
        if step in (0, 3, 4):
            give_gradients(99, hit)
            hit[0].grad[3] = math.nan
            protected.step()
        give_gradients(step, clean, hit)
        without.step()
        protected.step()
    assert protected.skipped_steps == 3
    protected.param_groups[0]["skipped_steps"] = 0
    assert_same_state(without, clean, protected, hit)


def test_count_of_skipped_steps_is_saved(backend):
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, skip_nonfinite=True, backend=backend)
    params[0].grad = torch.full((4,), math.nan)
    optimizer.step()
    other = FusedSGDR(make_params([4]), **OPTIONS, skip_nonfinite=True, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1


def test_count_of_skipped_steps_goes_on_after_a_checkpoint(backend):
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, skip_nonfinite=True, backend=backend)
    params[0].grad = torch.full((4,), math.nan)
    optimizer.step()
    (param,) = make_params([4])
    other = FusedSGDR([param], **OPTIONS, skip_nonfinite=True, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    param.grad = torch.full((4,), math.nan)
    other.step()
    assert other.skipped_steps == 2


def test_steps_skipped_by_a_scaler_are_counted(backend):
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, backend=backend)
    scaler = make_scaler(2.0)
    params[0].grad = torch.full((4,), math.inf)
    scaler.step(optimizer)
    assert optimizer.skipped_steps == 1


def test_clipping_may_change_between_steps(backend):
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.max_grad_norm = 1.0
    optimizer.skip_nonfinite = True
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm([params[0].grad]))
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
    optimizer.step()
    assert optimizer.grad_norm is None


def test_norm_without_gradients_is_zero(backend):
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert float(optimizer.grad_norm) == 0


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_infinite_limit_only_measures(backend, bad):
    """clip_grad_norm_(params, inf) returns the norm; but one infinite gradient makes all NaN."""
    ours, theirs = make_params([5, 17]), make_params([5, 17])
    measured = FusedSGDR(ours, **OPTIONS, max_grad_norm=math.inf, backend=backend)
    expected = FusedSGDR(theirs, **OPTIONS, backend=backend)
    give_gradients(0, ours, theirs)
    if bad is not None:
        ours[0].grad[1] = theirs[0].grad[1] = bad
    norm = torch.nn.utils.get_total_norm([param.grad for param in ours])
    measured.step()
    expected.step()
    assert_same(measured, ours, expected, theirs)
    assert float(measured.grad_norm) == pytest.approx(float(norm), rel=1e-6, nan_ok=True)
