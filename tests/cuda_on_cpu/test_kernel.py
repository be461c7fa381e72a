"""The kernel itself, compiled by g++: its results are the reference's, bit for bit.

Under AddressSanitizer and UndefinedBehaviorSanitizer throughout; races and missing fences are
ThreadSanitizer's to find.
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


@pytest.mark.parametrize("grad_scale", [None, 1.0, 1024.0, 3.0], ids=lambda s: f"grad_scale_{s}")
def test_every_option_and_dtype_in_one_launch(program, tmp_path, grad_scale) -> None:
    groups = [
        {"params": params((1, 37), dtype, 10 * number)} | options
        for number, (options, dtype) in enumerate(itertools.product(ANY_OPTIONS.values(), TYPES))
    ]
    case = Case(groups)
    case.steps(4, grad_scale=grad_scale)
    assert case.difference(program, tmp_path) == ""


@pytest.mark.parametrize("options", [{}, NESTEROV], ids=["plain", "nesterov"])
def test_every_mixture_of_dtypes(program, tmp_path, options) -> None:
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
def test_memory_that_is_not_aligned(program, tmp_path, dtype) -> None:
    offsets = [
        [element * dtype.itemsize for element in elements]
        for elements in itertools.product((0, 1, 3, 16), repeat=3)
    ]
    case = Case(
        [{"params": params((67,) * len(offsets), dtype)} | NESTEROV], offsets=lambda i: offsets[i]
    )
    case.steps(2)
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
def test_gradients_that_come_and_go_and_steps_that_are_skipped(program, tmp_path, options) -> None:
    assert with_missing_grads(options).difference(program, tmp_path) == ""


def test_a_first_step_reads_nothing_from_the_buffer(program, tmp_path) -> None:
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
    case = Case([{"params": params((3, 2), seed=n), "momentum": 0.9} | schedule
                 for n, schedule in enumerate(SCHEDULES)], multiprocessors=2)  # fmt: skip
    case.steps(count)
    return case


def test_each_group_follows_its_schedule_over_restarts(program, tmp_path) -> None:
    case = over_restarts(50)
    assert all(group["cycle"] >= 2 for group in case.optimizer.param_groups)
    assert case.difference(program, tmp_path) == ""


def with_changed_options() -> Case:
    case = Case([{"params": params((9,), seed=n), "momentum": 0.9} for n in range(3)])
    first, second, third = case.optimizer.param_groups
    case.steps(3)
    first["eta_min"], second["lr"] = 0.05, 0.3
    case.steps(2)
    second["initial_lr"], third["cycle_decay"], first["weight_decay"] = 0.7, 0.5, 0.1
    case.steps(1, found_inf=1.0)  # the change must not be lost with the step
    case.steps(4)
    first["T_mult"], third["lr"] = 3, 1e-3
    case.steps(1, found_inf=1.0)
    case.steps(5)
    return case


def test_options_that_are_changed_between_steps(program, tmp_path) -> None:
    assert with_changed_options().difference(program, tmp_path) == ""


# ----------------------------------------------------------------------------------------- launches


def test_more_tensors_than_one_launch_takes(program, tmp_path) -> None:
    groups = [{"params": params((1,) * 900, seed=n), "momentum": 0.9} for n in range(2)]
    case = Case([*groups, {"params": params((2,) * 200), "momentum": 0.9, "reset_momentum": True}])
    for p in case.optimizer.param_groups:
        p["T_0"] = 2
    case.steps(2)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [3, 3]


def test_groups_without_tensors_advance(program, tmp_path) -> None:
    case = Case([{"params": params((4,), seed=n), "momentum": 0.9} for n in range(3)])
    grads = case.some_grads()
    for _ in range(4):
        case.step([None, grads[1], None])
        case.step([None, None, None])
    assert case.difference(program, tmp_path) == ""


def test_more_groups_than_one_launch_takes(program, tmp_path) -> None:
    case = Case([{"params": params((1,), seed=n), "momentum": 0.9} for n in range(450)])
    case.step(case.some_grads())
    case.step([None] * 450)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [3, 2]


# -------------------------------------------------------------------------------------------- races


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

    Of the dtypes only float64 and the mixtures keep loops of their own: the rest takes long to
    compile.
    """
    csrc = REPOSITORY / "csrc"
    files = [*csrc.glob("*_*.h"), *csrc.glob("cuda/*.cuh"), *csrc.glob("cuda/*launch.h")]
    sources = {str(path.relative_to(csrc)): path.read_text() for path in files}
    lines = sources["cuda/loops.cuh"].splitlines(keepends=True)
    table = re.compile(r" +ElementTypes\{(?!kDouble)")
    sources["cuda/loops.cuh"] = "".join(line for line in lines if not table.match(line))
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


# So that a launch takes a few tensors only, and a tensor's pieces lie in several launches.
SMALL = [
    ("kMaxPieceNumel = 1u << 31", "kMaxPieceNumel = 2 * kChunkNumel"),
    ("payload[32720]", "payload[720]"),
]


class Mutant(NamedTuple):
    """A bug to plant: `old` becomes `new`, where BUG is true if it is asked for."""

    old: str
    new: str
    said: str
    sanitizer: str = ADDRESS


OVERRUN = "use-after-poison|heap-buffer-overflow"
MISALIGNED = "misaligned address"
PARAM = r"parameter \d+ differs"
POSITION = r"position of group \d differs"
RACE = "data race"

MUTANTS = {
    # The elements of a chunk.
    "tail_ends_late": Mutant("i < chunk.numel;", "i < chunk.numel + BUG;", OVERRUN),
    "tail_begins_late": Mutant("i = done +", "i = BUG + done +", PARAM),
    "no_alignment_test": Mutant("chunk.is_aligned() ?", "BUG || chunk.is_aligned() ?", MISALIGNED),
    "grads_alignment_not_tested": Mutant(
        "reinterpret_cast<uintptr_t>(grad.address)",
        "reinterpret_cast<uintptr_t>(BUG ? nullptr : grad.address)",
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
    "chunks_left_out": Mutant("index += gridDim.x", "index += gridDim.x + BUG", PARAM),
    # The groups and their options.
    "wrong_group": Mutant(
        "args.group(tensor.group);\n    if (tensor.group !=",
        "args.group(BUG ? 0 : tensor.group);\n    if (tensor.group !=",
        OVERRUN,
    ),
    "scalars_of_another_group": Mutant(
        "if (tensor.group != group_of_scalars)",
        "if (BUG ? group_of_scalars == args.group_count : tensor.group != group_of_scalars)",
        PARAM,
    ),
    "grad_scale_ignored": Mutant(
        "grad_scale == nullptr ?", "grad_scale == nullptr || BUG ?", PARAM
    ),
    "lr_source_ignored": Mutant(
        ".lr = group.lr_source == LrSource::kState",
        ".lr = group.lr_source == LrSource::kState || BUG",
        PARAM,
    ),
    # First and skipped steps.
    "first_step_reads_the_buffer": Mutant(
        "!chunk.first_step)", "(BUG || !chunk.first_step))", PARAM
    ),
    "first_step_dampened": Mutant("if (chunk.first_step)", "if (!BUG && chunk.first_step)", PARAM),
    "first_step_loses_the_sign_of_zero": Mutant("= T{-0.0};", "= BUG ? T{0} : T{-0.0};", PARAM),
    "flags_not_cleared": Mutant(
        "if (group.has_momentum && tensor",
        "if (!BUG && group.has_momentum && tensor",
        "flags of group 0 differs",
    ),
    "flags_cleared_before_the_last_piece": Mutant(
        ".completes_param) group", ".completes_param + BUG) group", PARAM
    ),
    "momentum_kept_at_a_restart": Mutant(
        "first_step[i] = 1;", "first_step[i] = !BUG;", "flags of group 0 differs"
    ),
    "found_inf_ignored": Mutant("*args.found_inf != 0)", "*args.found_inf != 0 && !BUG)", POSITION),
    "schedule_advanced_on_found_inf": Mutant(
        "cuda::skip_step(args);\n",
        "cuda::skip_step(args);\n"
        "    if (BUG && cuda::is_last_block(args.ticket)) cuda::finish_step(args);\n",
        POSITION,
    ),
    "change_lost_on_found_inf": Mutant(
        "if (blockIdx.x != 0) return;",
        "if (blockIdx.x != 0 || BUG) return;",
        "LR of group 1 differs",
    ),
    # The end of a launch.
    "every_launch_advances": Mutant(
        "if (args.group(i).advances)", "if (args.group(i).advances || BUG)", POSITION
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
    "no_barrier_before_the_scalars": Mutant(
        "__syncthreads();  // no thread", "if (!BUG) __syncthreads();  // no thread", RACE, THREAD
    ),
    "no_barrier_after_the_scalars": Mutant(
        "__syncthreads();\n      group_of",
        "if (!BUG) __syncthreads();\n      group_of",
        RACE,
        THREAD,
    ),
    "no_barrier_between_flags_and_restart": Mutant(
        "__syncthreads();  // a restart", "if (!BUG) __syncthreads();  // a restart", RACE, THREAD
    ),
    "scalars_written_by_all": Mutant(
        "if (threadIdx.x == 0) {\n        const",
        "if (threadIdx.x == 0 || BUG) {\n        const",
        RACE,
        THREAD,
    ),
}


@functools.cache
def program_of_mutants(sanitizer: str) -> Path:
    """A small kernel in which every bug can be asked for."""
    changes = list(SMALL)
    for name, mutant in MUTANTS.items():
        changes.append((mutant.old, mutant.new.replace("BUG", f'planted("{name}")')))
    flags = [*changed_kernel(changes), *(["-O0"] if sanitizer == ADDRESS else [])]
    return shim_program(FOLDER / "kernel_main.cpp", sanitize=sanitizer, flags=flags)


def everything() -> Case:
    """A few steps with all that the kernel has a branch for."""
    offsets = {1: (4, 4, 4), 3: (0, 4, 0), 4: (0, 0, 4)}
    case = Case(
        [
            {"params": params((12293, 70, 0)), "momentum": 0.9, "dampening": 0.1, "T_0": 2,
             "weight_decay": 0.01, "reset_momentum": True},
            {"params": params((20, 41, 5, 6, 7, 3, 8, 9, 9000), seed=5), **NESTEROV, "T_0": 3,
             "maximize": True},
            {"params": params((33, 3, 1, 2, 5, 6, 7, 4), seed=8), "weight_decay": 0.1,
             "decoupled_weight_decay": True, "warmup_steps": 2},
            {"params": params((9, 17), torch.float64, 16), "momentum": 0.5},
        ],
        offsets=lambda i: offsets.get(i, (0, 0, 0)),
        threads=32,
    )  # fmt: skip
    first = case.some_grads()
    first[0][:40], first[4] = -0.0, None
    case.step(first)
    case.steps(1, found_inf=1.0)
    case.steps(3, grad_scale=8.0)
    case.optimizer.param_groups[1]["eta_min"] = 0.01
    case.steps(1, found_inf=1.0)
    case.optimizer.param_groups[3]["initial_lr"] = 0.2
    case.steps(2, found_inf=0.0)
    return case


@pytest.fixture(scope="module")
def case_of_everything() -> Case:
    return everything()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_no_bug_is_found_where_none_is_planted(
    case_of_everything, tmp_path, sanitizer, seed
) -> None:
    """In several orders of threads and blocks."""
    program = program_of_mutants(sanitizer)
    assert case_of_everything.difference(program, tmp_path, seed=seed) == ""
    assert min(case_of_everything.launches) > 1


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_caught(case_of_everything, tmp_path, bug) -> None:
    program = program_of_mutants(MUTANTS[bug].sanitizer)
    found = case_of_everything.difference(program, tmp_path, bug=bug)
    assert re.search(MUTANTS[bug].said, found), found
