"""The inputs with which torch tests its own SGD."""

import pytest
import torch
from pair import Pair, assert_same, copies_of, give_gradients, make_params

from sgdr_fused import FusedSGDR

pytest.importorskip("expecttest")  # torch.testing's own tests want it
from torch.testing._internal.common_optimizers import (
    optim_error_inputs_func_sgd,
    optim_inputs_func_sgd,
)

INPUTS = optim_inputs_func_sgd(device="cpu")
ERROR_INPUTS = optim_error_inputs_func_sgd("cpu", torch.float32)


def options_of(optimizer_input):
    other = ("foreach", "fused", "differentiable")
    return {key: value for key, value in optimizer_input.kwargs.items() if key not in other}


@pytest.mark.parametrize("optimizer_input", INPUTS, ids=[i.desc for i in INPUTS])
def test_torchs_inputs_equal_the_pair(backend, dtype, optimizer_input):
    options = options_of(optimizer_input)
    ours = make_params([65, 7], dtype)
    theirs = copies_of(ours)
    optimizer = FusedSGDR(ours, T_0=5, T_mult=2, backend=backend, **options)
    if isinstance(options.get("lr"), torch.Tensor):
        # We read a tensor once; torch's scheduler would write to it.
        options["lr"] = float(options["lr"])
    pair = Pair(theirs, T_0=5, T_mult=2, **options)
    for step in range(20):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs, f"after step {step}")


@pytest.mark.parametrize(
    "error_input", ERROR_INPUTS, ids=[e.optimizer_error_input.desc for e in ERROR_INPUTS]
)
def test_torchs_error_inputs_are_errors(backend, error_input):
    options = options_of(error_input.optimizer_error_input)
    params = error_input.optimizer_error_input.params
    if params is None:
        params = make_params([3])
    # torch only warns of duplicates, and updates them twice.
    error = ValueError if error_input.error_type is UserWarning else error_input.error_type
    with pytest.raises(error, match=error_input.error_regex):
        FusedSGDR(params, T_0=5, backend=backend, **options)
