"""Clipping, averages and low precision in the kernels equal the reference, bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FOLDER, shim_program
from kernel_cases import TYPES, Case, params

from sgdr_fused.reference import Clipping

NESTEROV = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
DECOUPLED = {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True}
SGD_OPTIONS = ({}, NESTEROV, DECOUPLED)
HALF_TYPES = (torch.float16, torch.bfloat16)

PRECISIONS = {
    "as_it_is": {},
    "bfloat16_momentum": {"momentum_dtype": torch.bfloat16},
    "float16_momentum": {"momentum_dtype": torch.float16},
    "float32_momentum": {"momentum_dtype": torch.float32},
    "rounding": {"stochastic_rounding": True, "seed": 2**64 - 3},
    "rounding_float16_momentum": {"stochastic_rounding": True, "momentum_dtype": torch.float16},
    "masters": {"master_weights": True},
    "masters_bfloat16_momentum": {"master_weights": True, "momentum_dtype": torch.bfloat16},
}
AVERAGES = ({}, {"ema_decay": 0.9}, {"ema_decay": "swa"}, {"ema_decay": 0.0})


@pytest.fixture(scope="module")
def program() -> Path:
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return shim_program(FOLDER / "kernel_main.cpp", sanitize="address,undefined", flags=["-O0"])


def in_one_step(combinations: Iterable[tuple[Any, ...]]) -> Case:
    """A group for each combination of an average, a precision, SGD's options and a dtype."""
    case = Case(
        [
            {"params": params((1, 37), dtype, 10 * n), "T_0": 2, "T_mult": 1}
            | sgd_options
            | average
            | precision
            for n, (average, precision, sgd_options, dtype) in enumerate(combinations)
        ]
    )
    case.steps(6, grad_scale=8.0)
    return case


def test_every_pair_of_options_and_dtypes_in_one_step(program, tmp_path) -> None:
    """Each value of one axis meets each of every other."""
    sgd_options = itertools.cycle(SGD_OPTIONS)
    combinations = [
        (average, precision, next(sgd_options), TYPES[(a + p) % len(TYPES)])
        for a, average in enumerate(AVERAGES)
        for p, precision in enumerate(PRECISIONS.values())
    ]
    axes = (AVERAGES, PRECISIONS, SGD_OPTIONS, TYPES)
    for i, j in itertools.combinations(range(len(axes)), 2):
        pairs = {(str(one[i]), str(one[j])) for one in combinations}
        assert len(pairs) == len(axes[i]) * len(axes[j])
    assert in_one_step(combinations).difference(program, tmp_path) == ""


@pytest.mark.exhaustive
@pytest.mark.parametrize("sgd_options", SGD_OPTIONS, ids=["plain", "L2", "SGDW"])
def test_every_combination_of_options_and_dtypes_in_one_step(
    program, tmp_path, sgd_options
) -> None:
    combinations = itertools.product(AVERAGES, PRECISIONS.values(), [sgd_options], TYPES)
    assert in_one_step(combinations).difference(program, tmp_path) == ""


def test_each_option_alone_equals_the_reference(program, tmp_path) -> None:
    """No other option of the step asks for the loops with extras."""
    for option in (*PRECISIONS.values(), *AVERAGES, {"maximize": True}):
        groups = [
            {"params": params((70, 5), dtype, 3)} | NESTEROV | option
            for dtype in (torch.float32, torch.bfloat16)
        ]
        case = Case(groups, clipping=Clipping(1.0))
        case.steps(2)
        assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize("momentum_dtype", TYPES, ids=str)
def test_every_mixture_of_dtypes_equals_the_reference(program, tmp_path, momentum_dtype) -> None:
    pairs = list(itertools.product(TYPES, repeat=2))
    options = {"ema_decay": 0.9, "momentum_dtype": momentum_dtype} | NESTEROV
    case = Case(
        [
            {"params": [params((n,), pair[0], n)[0] for pair in pairs for n in (9, 70)]}
            | options
            | precision
            for precision in ({"stochastic_rounding": True}, {"master_weights": True})
        ],
        grad_dtypes=2 * [pair[1] for pair in pairs for _ in range(2)],
    )
    case.steps(3)
    assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_misaligned_memory_equals_the_reference(program, tmp_path, dtype) -> None:
    """Each of the five tensors in turn is misaligned; state elements have 2, 4 or 8 bytes."""
    offsets = [[0] * 5] + [[8 * (i == role) for i in range(5)] for role in range(5)]
    options = {"ema_decay": 0.9} | NESTEROV
    for precision in PRECISIONS.values():
        case = Case(
            [{"params": params((67,) * len(offsets), dtype)} | options | precision],
            offsets=lambda i: offsets[i],
        )
        case.steps(2)
        assert case.difference(program, tmp_path) == ""


# -------------------------------------------------------------------------------------------- draws


def test_random_numbers_depend_on_step_and_place(program, tmp_path) -> None:
    """In a later group and far into a training."""
    case = Case(
        [{"params": params((64, 5), dtype), "stochastic_rounding": True, "seed": seed} | NESTEROV
         for seed, dtype in enumerate(HALF_TYPES)],
    )  # fmt: skip
    for group, step in zip(case.optimizer.param_groups, (2**31 + 1, 2**32 + 7), strict=True):
        group["step"] = step
    case.begin()
    case.steps(2)
    assert case.difference(program, tmp_path) == ""


# -------------------------------------------------------------------------- skipped steps, averages


def nonfinite(case: Case, place: int, value: float) -> list[torch.Tensor]:
    """Gradients with one element that is not finite."""
    grads = case.some_grads()
    grads[place][-1] = value
    return grads


def with_skipped_steps() -> Case:
    """Both reasons to skip, the first step included."""
    options = {"ema_decay": 0.5, "T_0": 2} | NESTEROV
    case = Case(
        [
            {"params": params((70, 3)), "momentum_dtype": torch.bfloat16} | options,
            {"params": params((40, 4), torch.bfloat16), "master_weights": True} | options,
            {"params": params((33,), torch.bfloat16), "stochastic_rounding": True} | options
            | {"ema_decay": "swa"},
        ],
        clipping=Clipping(2.0, skip_nonfinite=True),
    )  # fmt: skip
    case.step(nonfinite(case, 0, math.inf))
    case.step(case.some_grads(), found_inf=1.0, grad_scale=4.0)
    case.steps(1)
    case.optimizer.param_groups[1]["eta_min"] = 0.01
    case.step(nonfinite(case, 4, math.nan), found_inf=0.0)
    case.step(nonfinite(case, 2, -math.inf), grad_scale=2.0)
    case.steps(3)
    return case


def test_skipped_step_changes_only_their_count(program, tmp_path) -> None:
    case = with_skipped_steps()
    assert [group["skipped_steps"] for group in case.optimizer.param_groups] == [4, 4, 4]
    assert case.difference(program, tmp_path) == ""


def with_equal_averages() -> Case:
    """Three cycles and more; some parameters have no gradient at a cycle's end, or join late."""
    schedules = (
        {"T_0": 2, "T_mult": 2},
        {"T_0": 3, "T_mult": 1, "n_cycles": 2},
        {"T_0": 2, "T_mult": 1, "warmup_steps": 2, "reset_momentum": True},
    )
    case = Case(
        [{"params": params((9, 40, 3), dtype), "ema_decay": "swa"} | NESTEROV | schedule
         for schedule, dtype in zip(schedules, (torch.float32, torch.bfloat16, torch.float64),
                                    strict=True)],
    )  # fmt: skip
    present = ("111111111", "111110111", "110111111", "011111111", "111111101", "111011110")
    for step in range(15):
        has_grad = present[step % len(present)]
        grads = case.some_grads()
        case.step([g if c == "1" else None for g, c in zip(grads, has_grad, strict=True)])
    return case


def test_equal_averages_are_taken_at_the_ends_of_cycles(program, tmp_path) -> None:
    case = with_equal_averages()
    counts = {case.optimizer.state[param]["n_averaged"] for param in case.params}
    assert len(counts) > 1
    assert max(counts) >= 3
    assert case.difference(program, tmp_path) == ""


def test_average_or_master_copy_may_join_later(program, tmp_path) -> None:
    case = Case([{"params": params((9, 70), dtype, 2)} | NESTEROV | {"ema_decay": 0.9}
                 for dtype in (torch.float32, torch.bfloat16)])  # fmt: skip
    grads = case.some_grads()
    case.step([grads[0], None, None, grads[3]])
    case.steps(2)
    assert case.difference(program, tmp_path) == ""


# ----------------------------------------------------------------------------------------- launches


def test_more_tensors_with_extras_than_one_launch_takes(program, tmp_path) -> None:
    groups = [{"params": params((1,) * 500, torch.bfloat16, seed=n), "ema_decay": 0.9,
               "master_weights": True} | NESTEROV for n in range(2)]  # fmt: skip
    case = Case(groups)
    case.steps(1)
    case.steps(1, found_inf=1.0)
    case.steps(1)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [3, 3, 3]


@pytest.mark.parametrize(
    ("options", "fit"),
    [({}, 640), ({"ema_decay": 0.9}, 457)],
    ids=["plain", "with extras"],
)
@pytest.mark.parametrize("more", [0, 1])
def test_number_of_tensors_that_fit_into_one_launch(program, tmp_path, options, fit, more) -> None:
    case = Case([{"params": params((1,) * (fit + more)), "momentum": 0.9} | options])
    case.steps(1)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [1 + more]


# -------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_norm_of_no_gradients_and_of_zeros(program, tmp_path, skip_nonfinite) -> None:
    case = Case([{"params": params((5, 7))}], clipping=Clipping(1.0, skip_nonfinite))
    case.step([None, None])
    case.step([torch.zeros(5), None])
    assert case.difference(program, tmp_path) == ""


def test_overflowing_squares_of_float64_gradients(program, tmp_path) -> None:
    """The norm is infinite though no gradient is: clipped to nothing, or skipped."""
    for skip_nonfinite in (False, True):
        case = Case([{"params": params((5,), torch.float64)}],
                    clipping=Clipping(1.0, skip_nonfinite))  # fmt: skip
        case.step([torch.full((5,), 1e200, dtype=torch.float64)])
        assert case.difference(program, tmp_path) == ""
