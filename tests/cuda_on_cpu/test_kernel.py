"""The kernel itself, compiled by g++, equals the reference bit for bit.

Under AddressSanitizer and UndefinedBehaviorSanitizer. make test-all also looks for races and
missing fences by ThreadSanitizer, and plants bugs in the kernel, each of which must be found.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import ANY_OPTIONS
from fake_cuda import CACHE, FOLDER, REPOSITORY, shim_program
from kernel_cases import TYPES, Case, params

from sgdr_fused.reference import Clipping

ADDRESS = "address,undefined"
THREAD = "thread"

# Around a vector of each type, a block's worth of vectors, and a chunk (4096).
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025, 1030, 2047, 2049)
CHUNK_SIZES = (4095, 4096, 4097, 8192, 8193, 12289)
NESTEROV = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


@pytest.fixture(scope="module")
def program() -> Path:
    """The kernel under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return shim_program(FOLDER / "kernel_main.cpp", sanitize=ADDRESS, flags=["-O0"])


# ------------------------------------------------------------------------------------------ updates


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_element_of_every_size_is_updated(program, tmp_path, dtype) -> None:
    case = Case([{"params": params(SIZES + CHUNK_SIZES, dtype)} | NESTEROV], threads=256)
    case.steps(3)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [1, 1, 1]


@pytest.mark.parametrize("grad_scale", [None, 3.0], ids=lambda s: f"grad_scale_{s}")
def test_every_option_and_dtype_in_one_launch(program, tmp_path, grad_scale) -> None:
    groups = [
        {"params": params((1, 37), dtype, 10 * number)} | options
        for number, (options, dtype) in enumerate(itertools.product(ANY_OPTIONS.values(), TYPES))
    ]
    case = Case(groups)
    case.steps(4, grad_scale=grad_scale)
    assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize("options", [{}, NESTEROV], ids=["plain", "nesterov"])
def test_every_mixture_of_dtypes_equals_the_reference(program, tmp_path, options) -> None:
    triples = list(itertools.product(TYPES, repeat=3 if options else 2))
    case = Case(
        [
            {"params": [params((n,), triple[0], n)[0] for triple in triples for n in (9, 41)]}
            | options
        ],
        grad_dtypes=[triple[1] for triple in triples for _ in range(2)],
        momentum_dtypes=[triple[2] for triple in triples for _ in range(2)] if options else None,
    )
    case.steps(3)
    assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_misaligned_memory_equals_the_reference(program, tmp_path, dtype) -> None:
    offsets = [
        [element * dtype.itemsize for element in elements]
        for elements in itertools.product((0, 1, 3, 16), repeat=3)
    ]
    case = Case(
        [{"params": params((67,) * len(offsets), dtype)} | NESTEROV], offsets=lambda i: offsets[i]
    )
    case.steps(2)
    assert case.difference(program, tmp_path) == ""


# ------------------------------------------------------------ clipping, averages, low precision

MORE_OPTIONS = {
    "ema": {"ema_decay": 0.9},
    "swa": {"ema_decay": "swa", "T_0": 2, "T_mult": 1},
    "momentum_in_bfloat16": NESTEROV | {"momentum_dtype": torch.bfloat16},
    "momentum_in_float16": NESTEROV | {"momentum_dtype": torch.float16, "seed": 2**64 - 1},
    "stochastic_rounding": NESTEROV | {"stochastic_rounding": True, "seed": 7},
    "without_momentum": {"stochastic_rounding": True},
    "master_weights": NESTEROV | {"master_weights": True},
    "all_at_once": NESTEROV
    | {"ema_decay": 0.5, "master_weights": True, "momentum_dtype": torch.float16},
}
IN_MAKE_TEST = [
    ("stochastic_rounding", torch.float16),
    ("all_at_once", torch.float32),
    ("all_at_once", torch.bfloat16),
]


# make test takes each of these options alone, and all of them together, in test_kernel_options.py.
OPTIONS_AND_DTYPES = [
    pytest.param(
        MORE_OPTIONS[name],
        dtype,
        id=f"{name}-{dtype}",
        marks=() if (name, dtype) in IN_MAKE_TEST else pytest.mark.exhaustive,
    )
    for name, dtype in itertools.product(MORE_OPTIONS, TYPES)
]


@pytest.mark.parametrize(("options", "dtype"), OPTIONS_AND_DTYPES)
def test_averages_and_low_precision_of_every_size(program, tmp_path, options, dtype) -> None:
    sizes = (0, 1, 7, 8, 9, 63, 64, 65, 1025, 4095, 4096, 4097, 8193)
    offsets = {2: (2 * dtype.itemsize,) * 3 + (8, 8), 5: (0, 0, 0, 8, 8)}
    case = Case(
        [
            {"params": params(sizes, dtype)} | options,
            {"params": params((70, 3), dtype, 50), "maximize": True} | options,
        ],
        offsets=lambda i: offsets.get(i, (0, 0, 0)),
        threads=256,
    )
    case.steps(1, found_inf=1.0)
    case.steps(2)
    case.steps(3, grad_scale=4.0)
    assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float64, marks=pytest.mark.exhaustive),
        pytest.param(torch.float16, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [32, 256])
def test_norm_equals_the_reference_in_any_grid(program, tmp_path, dtype, threads) -> None:
    sizes = (0, 1, 3, 4, 5, 127, 128, 129, 4095, 4096, 4097, 40_001)
    offsets = {i: (0, dtype.itemsize) for i in (4, 7, 10)}
    case = Case(
        [{"params": params(sizes, dtype)}],
        offsets=lambda i: offsets.get(i, (0, 0)),
        clipping=Clipping(max_grad_norm=1.0),
        threads=threads,
    )
    case.steps(2)
    case.step([None] * len(sizes))
    case.steps(1, grad_scale=16.0)
    assert case.difference(program, tmp_path) == ""
    assert case.norm_launches == [1, 1, 1, 1]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_gradients_are_skipped_or_not(program, tmp_path, bad) -> None:
    case = Case([{"params": params((5, 300)), "momentum": 0.9, "ema_decay": 0.5}])
    for clipping in (Clipping(skip_nonfinite=True), Clipping(2.0, True), Clipping(2.0)):
        case.clipping = clipping
        case.steps(1)
        grads = case.some_grads()
        grads[1][299] = bad
        case.step(grads)
    assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize("grad_scale", [0.0, float("nan"), float("inf")])
def test_finite_gradients_of_a_wrong_scale_are_skipped(program, tmp_path, grad_scale) -> None:
    """It went by the sum of their squares before the division."""
    case = Case([{"params": params((5, 300)), "momentum": 0.9}])
    case.clipping = Clipping(skip_nonfinite=True)
    case.steps(1)
    case.steps(1, grad_scale=grad_scale)
    case.steps(1)
    assert case.difference(program, tmp_path) == ""


# ----------------------------------------------------------------------- first steps, skipped steps


def with_missing_grads(options: dict[str, object]) -> Case:
    """Gradients come and go, parameters are unfrozen late, steps overflow."""
    case = Case([{"params": params((5, 40, 0, 7), seed=9)} | options,
                 {"params": params((33, 4100), torch.bfloat16)} | options])  # fmt: skip
    present = ("101011", "000000", "011111", "111001", "111111", "000010", "110110", "111111")
    overflow = (1.0, None, 1.0, 0.0, 1.0, 0.0, None, 0.0)
    for has_grad, found_inf in zip(present, overflow, strict=True):
        grads = [g if c == "1" else None for g, c in zip(case.some_grads(), has_grad, strict=True)]
        case.step(grads, found_inf=found_inf, grad_scale=None if found_inf is None else 8.0)
    return case


@pytest.mark.parametrize("options", ANY_OPTIONS.values(), ids=ANY_OPTIONS.keys())
def test_missing_gradients_and_skipped_steps(program, tmp_path, options) -> None:
    assert with_missing_grads(options).difference(program, tmp_path) == ""


def test_first_step_does_not_read_the_buffer(program, tmp_path) -> None:
    """The driver fills it with NaN; a gradient of -0 stays -0."""
    case = Case([{"params": params((64,)), "momentum": 0.9, "dampening": 0.5}])
    case.step([torch.full((64,), -0.0)])
    assert case.difference(program, tmp_path) == ""
    buffer = case.optimizer.state[case.params[0]]["momentum_buffer"]
    assert buffer.signbit().all()


# ---------------------------------------------------------------------------------------- schedules

SCHEDULES = (
    {"T_0": 3, "T_mult": 2},
    {"T_0": 4, "T_mult": 1.5, "eta_min": 1e-3, "cycle_decay": 0.7},
    {"T_0": 2, "T_mult": 3, "warmup_steps": 5, "warmup_start_lr": 0.01},
    {"T_0": 2, "steps_per_epoch": 3, "anneal": "epoch"},
    {"T_0": 5, "T_mult": 1, "n_cycles": 3, "eta_min": 0.02},
    {"T_0": 1, "T_mult": 1, "reset_momentum": True},
    {"T_0": 3, "T_mult": 2, "reset_momentum": True, "n_cycles": 3},
)


def over_restarts(count: int) -> Case:
    groups = [
        {"params": params((3, 2), seed=n), "momentum": 0.9} | schedule
        for n, schedule in enumerate(SCHEDULES)
    ]
    case = Case(groups, threads=32)
    case.steps(count)
    return case


def test_each_group_follows_its_schedule_over_restarts(program, tmp_path) -> None:
    case = over_restarts(24)
    assert all(group["cycle"] >= 2 for group in case.optimizer.param_groups)
    assert case.difference(program, tmp_path) == ""


def with_changed_options() -> Case:
    groups = [{"params": params((9,), seed=n), "momentum": 0.9} for n in range(3)]
    by_epoch = {"params": params((9,), seed=3), "anneal": "epoch", "steps_per_epoch": 4}
    case = Case([*groups, by_epoch])
    first, second, third, fourth = case.optimizer.param_groups
    case.steps(3)
    first["eta_min"], second["lr"] = 0.05, 0.3
    case.steps(2)
    second["initial_lr"], third["cycle_decay"], first["weight_decay"] = 0.7, 0.5, 0.1
    case.steps(1, found_inf=1.0)  # the change must not be lost with the step
    case.steps(4)
    first["T_mult"], third["lr"], fourth["lr"] = 3, 1e-3, 0.3
    case.steps(1, found_inf=1.0)
    third["eta_min"] = 1e-4  # the LR that was set by hand must not be lost with the step
    case.steps(5)
    return case


def test_options_may_change_between_steps(program, tmp_path) -> None:
    assert with_changed_options().difference(program, tmp_path) == ""


# ----------------------------------------------------------------------------------------- launches


def test_more_tensors_than_one_launch_takes(program, tmp_path) -> None:
    groups = [{"params": params((1,) * 900, seed=n), "momentum": 0.9} for n in range(2)]
    case = Case([*groups, {"params": params((2,) * 200), "momentum": 0.9, "reset_momentum": True}])
    for p in case.optimizer.param_groups:
        p["T_0"] = 2
    case.steps(2)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [4, 4]


def test_groups_without_tensors_advance(program, tmp_path) -> None:
    case = Case([{"params": params((4,), seed=n), "momentum": 0.9} for n in range(3)])
    grads = case.some_grads()
    for _ in range(4):
        case.step([None, grads[1], None])
        case.step([None, None, None])
    assert case.difference(program, tmp_path) == ""


def test_more_groups_than_one_launch_takes(program, tmp_path) -> None:
    case = Case([{"params": params((1,), seed=n), "momentum": 0.9} for n in range(465)])
    case.step(case.some_grads())
    case.step([None] * 465)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [4, 3]


# -------------------------------------------------------------------------------------------- races


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "history",
    [
        lambda: over_restarts(6),
        lambda: with_missing_grads(NESTEROV | {"reset_momentum": True, "T_0": 2}),
        with_changed_options,
    ],
    ids=["restarts", "missing_grads", "changed_options"],
)
def test_no_two_threads_race_in_any_order(tmp_path, history, seed) -> None:
    program = shim_program(FOLDER / "kernel_main.cpp", sanitize=THREAD)
    assert history().difference(program, tmp_path, seed=seed) == ""


# --------------------------------------------------------------------- changed copies of the kernel


def changed_kernel(changes: Sequence[tuple[str, str]]) -> list[str]:
    """Flags by which kernel_main.cpp includes a copy of the kernel in which texts are replaced.

    Of the dtypes only float32 and float64 keep loops of their own: the rest takes long to compile.
    """
    csrc = REPOSITORY / "csrc"
    files = [*csrc.glob("*.h"), *csrc.glob("cuda/*.cuh"), *csrc.glob("cuda/*launch.h")]
    sources = {str(path.relative_to(csrc)): path.read_text() for path in files}
    sources["cuda/loops.cuh"] = re.sub(
        r"static_switch<kFloats,[^>]*>",
        "static_switch<kFloats, kDoubles, kAny>",
        sources["cuda/loops.cuh"],
    )
    for old, new in changes:
        assert sum(text.count(old) for text in sources.values()) == 1, old
        sources = {name: text.replace(old, new) for name, text in sources.items()}
    digest = hashlib.sha256("\0".join(sources.values()).encode()).hexdigest()[:16]
    folder = CACHE / f"kernel_{digest}"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(text)
    kernels = ("fused_step", "grad_norm")
    (folder / "kernels.h").write_text("".join(f'#include "cuda/{k}.cuh"\n' for k in kernels))
    return [f'-DKERNELS_HEADER="{folder}/kernels.h"']


# A launch then takes only a few tensors, and a tensor's pieces are in several launches.
SMALL = [
    ("kMaxPieceNumel = 1u << 31", "kMaxPieceNumel = 2 * kChunkNumel"),
    ("kLargePayload = 25760", "kLargePayload = 728"),
    ("kMediumPayload = 10192", "kMediumPayload = 400"),
    ("kSmallPayload = 976", "kSmallPayload = 240"),
    ("kMaxNormPieceNumel = 1u << 28", "kMaxNormPieceNumel = 2 * kNormChunk"),
    ("kMostNormTensors = 1620", "kMostNormTensors = 3"),
    ("kMoreNormTensors = 636", "kMoreNormTensors = 2"),
    ("kFewNormTensors = 60", "kFewNormTensors = 1"),
]


class Mutant(NamedTuple):
    """A bug to plant: `old` becomes `new`, in which BUG is true if the bug is turned on."""

    old: str
    new: str
    said: str
    sanitizer: str = ADDRESS
    history: str = "plain"  # a key of HISTORIES


OVERRUN = "use-after-poison|heap-buffer-overflow"
MISALIGNED = "misaligned address"
PARAM = r"parameter \d+ differs"
POSITION = r"position of group \d differs"
RACE = "data race"
STATE = r"state of group \d's parameter \d+ differs"
NORM = "the norm differs"

MUTANTS = {
    # The elements of a chunk.
    "tail_ends_late": Mutant(
        "i < chunk.numel; i += blockDim.x", "i < chunk.numel + BUG; i += blockDim.x", OVERRUN
    ),
    "tail_begins_late": Mutant("i = packs * kWidth +", "i = BUG + packs * kWidth +", PARAM),
    "second_pack_left_out": Mutant("i += 2 * blockDim.x", "i += (2 + BUG) * blockDim.x", PARAM),
    "second_pack_after_the_end": Mutant(
        "if (next < packs) update", "if (BUG || next < packs) update", f"{OVERRUN}|{PARAM}"
    ),
    "no_alignment_test": Mutant(
        "chunk.is_aligned() &&", "(BUG || chunk.is_aligned()) &&", MISALIGNED
    ),
    "grads_alignment_not_tested": Mutant(
        "grad.bits_of_address() | momentum",
        "(BUG ? 0 : grad.bits_of_address()) | momentum",
        MISALIGNED,
    ),
    "chunk_without_end": Mutant(
        "min(tensor.numel - begin, kChunkNumel)",
        "BUG ? tensor.numel - begin : min(tensor.numel - begin, kChunkNumel)",
        PARAM,
    ),
    "chunks_begin_early": Mutant(
        "(index - tensor.first_chunk) * kChunkNumel",
        "(index - tensor.first_chunk) * (kChunkNumel - BUG)",
        f"{MISALIGNED}|{PARAM}",
    ),
    "wrong_tensor": Mutant("first_chunk <= chunk", "first_chunk + BUG <= chunk", OVERRUN),
    "chunk_left_out": Mutant("if (blockIdx.x == 0)\n", "if (blockIdx.x <= BUG)\n", PARAM),
    "payload_too_small": Mutant(
        "needed <= kSmallPayload)", "needed <= kSmallPayload + 500 * BUG)", f"overflow|SEGV|{PARAM}"
    ),
    # The groups and their options.
    "wrong_group": Mutant(
        "args.group(tensor.group);\n  const double lr",
        "args.group(BUG ? 0 : tensor.group);\n  const double lr",
        f"{OVERRUN}|SEGV",
    ),
    "groups_overwritten_by_tensors": Mutant(
        "args_.payload + groups, tensors_",
        "args_.payload + (BUG ? 0 : groups), tensors_",
        f"{OVERRUN}|SEGV|{PARAM}",
    ),
    "grad_scale_ignored": Mutant(
        "grad_scale = args.grad_scale == nullptr ?",
        "grad_scale = BUG || args.grad_scale == nullptr ?",
        PARAM,
    ),
    "wrong_reciprocal_of_grad_scale": Mutant("(254 - exponent)", "(254 + BUG - exponent)", PARAM),
    "inexact_reciprocal_of_grad_scale": Mutant(
        "if ((bits & 0x007FFFFF) != 0 ||", "if ((!BUG && (bits & 0x007FFFFF) != 0) ||", PARAM
    ),
    "lr_source_ignored": Mutant(
        "if (group.lr_source == LrSource::kState)",
        "if (BUG || group.lr_source == LrSource::kState)",
        PARAM,
    ),
    "lr_set_by_hand_ignored": Mutant(
        "return state.lr == state.scheduled_lr ?",
        "return BUG || state.lr == state.scheduled_lr ?",
        PARAM,
    ),
    "lr_set_by_hand_lost_within_an_epoch": Mutant(
        "if (!was_set_by_hand || changes_lr", "if (BUG || !was_set_by_hand || changes_lr", "LR of"
    ),
    # First and skipped steps.
    "first_step_reads_the_buffer": Mutant(
        "if (kHasMomentum && chunk.momentum_is_empty)",
        "if (!BUG && kHasMomentum && chunk.momentum_is_empty)",
        PARAM,
    ),
    "first_step_dampened": Mutant(
        "if (chunk.momentum_is_empty) scalars.",
        "if (!BUG && chunk.momentum_is_empty) scalars.",
        PARAM,
    ),
    "first_step_loses_the_sign_of_zero": Mutant(
        "= T{kEmptyMomentum};", "= BUG ? T{0} : T{kEmptyMomentum};", PARAM
    ),
    "flags_not_cleared": Mutant(
        "if (group.options.has_momentum()) state",
        "if (!BUG && group.options.has_momentum()) state",
        STATE,
    ),
    "flags_cleared_before_the_last_piece": Mutant(
        "if (!tensor.completes_param)", "if (!BUG && !tensor.completes_param)", PARAM
    ),
    "momentum_kept_at_a_restart": Mutant(
        "momentum_is_empty = 1;", "momentum_is_empty = !BUG;", STATE
    ),
    "found_inf_ignored": Mutant("*args.found_inf != 0)", "*args.found_inf != 0 && !BUG)", POSITION),
    "schedule_advanced_on_found_inf": Mutant(
        "cuda::skip_step(args);\n",
        "cuda::skip_step(args);\n"
        "    if (BUG && blockIdx.x == 0) cuda::prepare_states(args);\n"
        "    if (BUG && cuda::is_last_block(args.ticket)) cuda::finish_step(args);\n",
        POSITION,
    ),
    "change_lost_on_found_inf": Mutant(
        "if (group.lr_source == LrSource::kSchedule &&",
        "if (!BUG && group.lr_source == LrSource::kSchedule &&",
        "LR of group 1 differs",
    ),
    # The end of a launch.
    "every_launch_advances": Mutant(
        "if (args.group(i).advances)", "if (args.group(i).advances || BUG)", POSITION
    ),
    "next_state_not_prepared": Mutant(
        "if (!group.advances) continue;", "if (BUG || !group.advances) continue;", POSITION
    ),
    "next_state_published_at_once": Mutant(
        "group.memory->next = next;",
        "(BUG ? group.memory->state : group.memory->next) = next;",
        RACE,
        THREAD,
    ),
    "no_ticket": Mutant(
        "is_last = atomicInc(ticket,",
        "is_last = BUG ? blockIdx.x == gridDim.x - 1 : atomicInc(ticket,",
        RACE,
        THREAD,
    ),
    "ticket_not_reset": Mutant(
        " gridDim.x - 1) == gridDim.x",
        " BUG ? ~0u : gridDim.x - 1) == gridDim.x",
        f"the ticket differs|{POSITION}",
    ),
    "no_fence_before_the_ticket": Mutant(
        "__threadfence();\n    is_last", "if (!BUG) __threadfence();\n    is_last", RACE, THREAD
    ),
    "no_fence_after_the_ticket": Mutant(
        "    __threadfence();\n  }", "    if (!BUG) __threadfence();\n  }", RACE, THREAD
    ),
    "no_barrier_before_the_ticket": Mutant(
        "bool is_last;\n  __syncthreads();",
        "bool is_last;\n  if (!BUG) __syncthreads();",
        RACE,
        THREAD,
    ),
    "no_barrier_after_the_ticket": Mutant(
        "__syncthreads();\n  return is_last;",
        "if (!BUG) __syncthreads();\n  return is_last;",
        RACE,
        THREAD,
    ),
    "no_barrier_after_the_lr": Mutant(
        "group.memory->state);\n  __syncthreads();",
        "group.memory->state);\n  if (!BUG) __syncthreads();",
        RACE,
        THREAD,
    ),
    "no_barrier_between_flags_and_restart": Mutant(
        "__syncthreads();  // a restart", "if (!BUG) __syncthreads();  // a restart", RACE, THREAD
    ),
    "lr_written_by_all": Mutant(
        "if (threadIdx.x == 0) lr =", "if (BUG || threadIdx.x == 0) lr =", RACE, THREAD
    ),
    # The norm, and what is made of it.
    "coefficient_not_applied": Mutant(
        "args.grad_norm == nullptr ? 1",
        "BUG || args.grad_norm == nullptr ? 1",
        PARAM,
        history="extras",
    ),
    "grad_scale_left_in_the_norm": Mutant(
        "sgdr::grad_norm(sum_of_squares, args.grad_scale == nullptr",
        "sgdr::grad_norm(sum_of_squares, BUG || args.grad_scale == nullptr",
        NORM,
        history="extras",
    ),
    "nonfinite_not_skipped": Mutant(
        "return args.skip_nonfinite &&",
        "return !BUG && args.skip_nonfinite &&",
        POSITION,
        history="extras",
    ),
    "skipped_step_counted_by_every_launch": Mutant(
        "if (group.advances) ++state",
        "if (BUG || group.advances) ++state",
        "number of skipped",
        history="extras",
    ),
    "lanes_folded_in_another_order": Mutant(
        "return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);",
        "return BUG ? (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])\n"
        "             : (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);",
        NORM,
        history="extras",
    ),
    "chunk_sums_of_a_later_launch": Mutant(
        "args.chunk_sums[args.first_chunk + chunk]",
        "args.chunk_sums[(BUG ? 0 : args.first_chunk) + chunk]",
        NORM,
        history="extras",
    ),
    "norm_without_its_last_element": Mutant(
        "if (index >= numel) continue;",
        "if (index + BUG >= numel) continue;",
        NORM,
        history="extras",
    ),
    # Averages.
    "empty_average_read": Mutant(
        "if (param.ema_is_empty) return 0;",
        "if (!BUG && param.ema_is_empty) return 0;",
        r"ema \d+ differs",
        history="extras",
    ),
    "averaged_weights_not_counted": Mutant(
        "state.n_averaged = state.ema_is_empty ?",
        "if (!BUG) state.n_averaged = state.ema_is_empty ?",
        STATE,
        history="extras",
    ),
    "averaged_amid_a_cycle": Mutant(
        "ends_cycle(group.options.schedule, group.memory->state.position));",
        "(BUG || ends_cycle(group.options.schedule, group.memory->state.position)));",
        STATE,
        history="extras",
    ),
    # Random numbers.
    "draws_of_the_first_chunk": Mutant(
        "kMaxPieceNumel + begin) / kDrawNumel",
        "kMaxPieceNumel + (BUG ? 0 : begin)) / kDrawNumel",
        PARAM,
        history="extras",
    ),
    "draws_of_the_first_piece": Mutant(
        "int64_t{tensor.piece}", "int64_t{BUG ? 0 : tensor.piece}", PARAM, history="extras"
    ),
    "draws_of_the_first_step": Mutant(
        "static_cast<uint32_t>(group.memory->state.position.step)",
        "BUG ? 0 : static_cast<uint32_t>(group.memory->state.position.step)",
        PARAM,
        history="extras",
    ),
    "draws_of_another_group": Mutant(
        "group.first_param + tensor.param_index}",
        "(BUG ? 0 : group.first_param) + tensor.param_index}",
        PARAM,
        history="extras",
    ),
    "momentum_rounded_by_the_parameters_bits": Mutant(
        "Rounded::kMomentumBuffer);",
        "BUG ? Rounded::kParam : Rounded::kMomentumBuffer);",
        r"momentum_buffer \d+ differs",
        history="extras",
    ),
    "draws_end_early": Mutant(
        "place * kDrawNumel >= numel",
        "(place + BUG) * kDrawNumel >= numel",
        PARAM,
        history="extras",
    ),
    "no_barrier_after_the_draws": Mutant(
        "group.options.has_momentum());\n    __syncthreads();",
        "group.options.has_momentum());\n    if (!BUG) __syncthreads();",
        RACE,
        THREAD,
        history="extras",
    ),
    # Master copies.
    "low_precision_copy_not_written": Mutant(
        "if (has_masters(extras) && chunk.low_precision_param.address != nullptr) {",
        "if (!BUG && has_masters(extras) && chunk.low_precision_param.address != nullptr) {",
        PARAM,
        history="extras",
    ),
    "empty_master_read": Mutant(
        "if (has_masters(extras) && chunk.master_is_empty)",
        "if (!BUG && has_masters(extras) && chunk.master_is_empty)",
        PARAM,
        history="extras",
    ),
    "master_stays_empty": Mutant(
        "state.master_is_empty = 0;", "state.master_is_empty = BUG;", STATE, history="extras"
    ),
}


@functools.cache
def program_of_mutants(sanitizer: str) -> Path:
    """A small kernel in which an environment variable turns on each bug."""
    changes = list(SMALL)
    for name, mutant in MUTANTS.items():
        changes.append((mutant.old, mutant.new.replace("BUG", f'planted("{name}")')))
    flags = [*changed_kernel(changes), *(["-O0"] if sanitizer == ADDRESS else [])]
    return shim_program(FOLDER / "kernel_main.cpp", sanitize=sanitizer, flags=flags)


def everything() -> Case:
    """A few steps that take every branch of the kernel."""
    # So many that the pieces of the next one lie in two launches.
    small = (3,) * 13
    offsets = {14: (4, 4, 4), 16: (0, 4, 0), 17: (0, 0, 4)}
    case = Case(
        [
            {"params": params((*small, 12293, 70, 0)), "momentum": 0.9, "dampening": 0.1, "T_0": 2,
             "weight_decay": 0.01, "reset_momentum": True},
            {"params": params((20, 41, 5, 6, 7, 3, 8, 9, 9000), seed=5), **NESTEROV, "T_0": 3,
             "maximize": True},
            {"params": params((33, 3, 1, 2, 5, 6, 7, 4), seed=8), "weight_decay": 0.1,
             "decoupled_weight_decay": True, "warmup_steps": 2},
            {"params": params((9, 17), torch.float64, 16), "momentum": 0.5, "anneal": "epoch",
             "steps_per_epoch": 50},
        ],
        offsets=lambda i: offsets.get(i, (0, 0, 0)),
        threads=32,
    )  # fmt: skip
    first = case.some_grads()
    first[13][:40], first[17] = -0.0, None
    case.step(first)
    case.steps(1, found_inf=1.0)
    case.steps(2, grad_scale=8.0)
    case.steps(1, grad_scale=3.0)
    case.optimizer.param_groups[1]["eta_min"] = 0.01
    case.steps(1, found_inf=1.0)
    second, last = case.optimizer.param_groups[1], case.optimizer.param_groups[3]
    last["initial_lr"] = 0.2
    case.steps(2, found_inf=0.0)
    second["lr"], second["eta_min"], last["lr"] = 0.3, 0.02, 0.05
    case.steps(2)
    return case


def everything_with_extras() -> Case:
    """Averages, rounding, master copies and the norm, in several launches and pieces."""
    half, short = torch.bfloat16, torch.float16
    momentum = {"momentum": 0.9, "dampening": 0.1}
    case = Case(
        [
            {"params": params((12293, *[5] * 9), half), **momentum, "T_0": 3,
             "stochastic_rounding": True, "seed": 2**63 + 9, "ema_decay": "swa"},
            {"params": params((70, 4099), short, 3), **momentum, "stochastic_rounding": True},
            {"params": params((41, 130, 0), half, 5), **NESTEROV, "master_weights": True,
             "ema_decay": 0.9},
            {"params": params((9000, 33), seed=8), **NESTEROV, "momentum_dtype": half,
             "ema_decay": 0.5},
        ],
        clipping=Clipping(max_grad_norm=3.0),
        threads=32,
    )  # fmt: skip
    case.steps(3)
    case.steps(1, found_inf=1.0)
    case.steps(2, grad_scale=8.0)
    case.clipping = Clipping(skip_nonfinite=True)
    grads = case.some_grads()
    grads[-2][17] = float("inf")
    case.step(grads)
    case.steps(1)
    return case


HISTORIES = {"plain": everything, "extras": everything_with_extras}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: make() for name, make in HISTORIES.items()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernel_without_a_planted_bug_passes(cases, tmp_path, sanitizer, seed, history) -> None:
    """Seeds give several orders of threads and blocks."""
    program = program_of_mutants(sanitizer)
    case = cases[history]
    assert case.difference(program, tmp_path, seed=seed) == ""
    assert min(case.launches) > 1
    if history == "extras":
        assert max(case.norm_launches) > 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", MUTANTS)
def test_planted_bug_is_caught(cases, tmp_path, bug) -> None:
    mutant = MUTANTS[bug]
    found = cases[mutant.history].difference(
        program_of_mutants(mutant.sanitizer), tmp_path, bug=bug
    )
    assert re.search(mutant.said, found), found
