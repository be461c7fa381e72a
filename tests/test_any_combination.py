"""The native step equals the reference for any valid mix of options, dtypes and layouts."""

import math

import pytest
import torch
from cases import LAYOUTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair import assert_same_state, draw, same_bits

from sgdr_fused import FusedSGDR, native

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.why_missing)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def group_options(draw_value):
    """A valid combination of a group's options."""

    def pick(*values):
        return draw_value(st.sampled_from(values))

    momentum = pick(0.0, 0.5, 0.9)
    options = {
        "lr": pick(0.1, 0.01),
        "momentum": momentum,
        "weight_decay": pick(0.0, 1e-2),
        "decoupled_weight_decay": pick(False, True),
        "nesterov": momentum > 0 and pick(False, True),
        "maximize": pick(False, True),
        "reset_momentum": pick(False, True),
        "ema_decay": pick(None, 0.0, 0.9, "swa"),
        "momentum_dtype": pick(None, torch.bfloat16, torch.float16, torch.float32),
        "seed": pick(0, 12345, 2**64 - 1),
        "T_0": pick(1, 2, 3),
        "T_mult": pick(1, 2, 1.5),
        "warmup_steps": pick(0, 2),
        "n_cycles": pick(None, 2),
    }
    options |= pick({}, {"stochastic_rounding": True}, {"master_weights": True})
    if momentum > 0 and not options["nesterov"]:
        options["dampening"] = pick(0.0, 0.3)
    return options


tensors = st.lists(
    st.tuples(
        st.sampled_from(DTYPES),
        st.sampled_from([None, torch.bfloat16, torch.float32]),
        st.sampled_from([(1, 1, 1, 1), (1, 3, 1, 5), (2, 3, 4, 5), (4, 16, 3, 3), (0, 1, 1, 1)]),
        st.sampled_from(sorted(LAYOUTS)),
    ),
    min_size=1,
    max_size=3,
)
whole = st.fixed_dictionaries(
    {
        "max_grad_norm": st.sampled_from([None, 0.1, 1e9]),
        "skip_nonfinite": st.booleans(),
        "grad_scale": st.sampled_from([None, 256.0]),
    }
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(st.tuples(group_options(), tensors), min_size=1, max_size=2), whole, st.data())
def test_native_step_equals_the_reference(groups, whole, data):
    grad_scale = whole.pop("grad_scale")
    generator = torch.Generator().manual_seed(0)
    sides = []
    for backend in ("native", "reference"):
        generator.manual_seed(0)
        param_groups = [
            {
                "params": [
                    torch.nn.Parameter(LAYOUTS[layout](draw(shape, dtype, generator)))
                    for dtype, _, shape, layout in kinds
                ],
                **options,
            }
            for options, kinds in groups
        ]
        sides.append(FusedSGDR(param_groups, T_0=1, **whole, backend=backend))
    params = [[p for g in o.param_groups for p in g["params"]] for o in sides]
    grad_dtypes = [kind[1] for _, kinds in groups for kind in kinds]
    bad_steps = data.draw(st.sets(st.integers(0, 7), max_size=2)) if whole["skip_nonfinite"] else ()

    for step in range(8):
        missing = data.draw(st.integers(0, 7))
        for i, (ours, theirs) in enumerate(zip(*params, strict=True)):
            grad = draw(ours.shape, torch.float32, generator)
            if step in bad_steps and grad.numel() and i == 0:
                grad.view(-1)[-1] = math.inf
            if missing == i:
                ours.grad = theirs.grad = None
                continue
            for p in (ours, theirs):
                p.grad_dtype = None
                p.grad = grad.to(grad_dtypes[i] or p.dtype)
        for optimizer in sides:
            if grad_scale is not None:
                optimizer.grad_scale = torch.tensor(grad_scale)
                optimizer.found_inf = torch.tensor(float(step == 5))
            optimizer.step()
        ours, theirs = (o.grad_norm for o in sides)
        assert (ours is None) == (theirs is None)
        assert ours is None or same_bits(ours, theirs)
        assert_same_state(sides[0], params[0], sides[1], params[1], f"after step {step}")
