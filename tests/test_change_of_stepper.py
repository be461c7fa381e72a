"""An optimizer that goes on with another stepper keeps its options and its state."""

import pytest
import torch
from pair import assert_unchanged, copies_of, give_gradients, make_params, snapshot

from sgdr_fused import FusedSGDR, native
from sgdr_fused.compiled import TracedStepper

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.why_missing)

OPTIONS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "T_0": 3}


def unlike(optimizer):
    """The parts of a snapshot that name objects, which two optimizers do not share."""
    return {name: snapshot(optimizer, [])[name] for name in ("members", "state")}


def test_reference_that_replaces_the_native_step_clips_too():
    params = make_params([5, 3])
    expected_params = copies_of(params)
    optimizer = FusedSGDR(params, max_grad_norm=0.1, **OPTIONS)
    expected = FusedSGDR(expected_params, max_grad_norm=0.1, backend="reference", **OPTIONS)
    give_gradients(0, params, expected_params)
    optimizer._fall_back()
    with pytest.warns(UserWarning, match="slower than torch.optim.SGD"):
        optimizer.step()
    expected.step()
    assert_unchanged(snapshot(expected, expected_params) | unlike(optimizer), optimizer, params)
    assert torch.equal(optimizer.grad_norm, expected.grad_norm)


def test_native_step_after_a_traced_one_finds_the_state_on_the_host():
    """The traced step creates empty buffers; a skipped one must not make them count as used."""
    params = make_params([5, 3])
    expected_params = copies_of(params)
    optimizer = FusedSGDR(params, **OPTIONS)
    expected = FusedSGDR(expected_params, **OPTIONS)
    give_gradients(0, params, expected_params)
    assert optimizer._init_group([], [], [], [])
    assert isinstance(optimizer._stepper, TracedStepper)
    for each in (optimizer, expected):
        each.found_inf = torch.ones(())
        each.step()
        del each.found_inf
        each.max_grad_norm = 0.1
        each.step()
    assert not isinstance(optimizer._stepper, TracedStepper)
    after = snapshot(expected, expected_params)
    found = snapshot(optimizer, params)
    assert_unchanged(
        after | {name: found[name] for name in ("members", "state")}, optimizer, params
    )
    assert all(type(group["step"]) is int for group in optimizer.param_groups)
