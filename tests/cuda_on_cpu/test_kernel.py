"""The kernel itself, compiled by g++: its results are the reference's, bit for bit.

Under AddressSanitizer and UndefinedBehaviorSanitizer throughout; races and missing fences are
ThreadSanitizer's to find.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

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
    return shim_program(FOLDER / "kernel_main.cpp", sanitize=ADDRESS)


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
        [{"params": [params((n,), triple[0], n)[0] for triple in triples for n in (9, 41)]} | options],
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


# --------------------------------------------------------------------------- first steps, skipped steps


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


# ----------------------------------------------------------------------------------------- schedules

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


# ------------------------------------------------------------------------------------------ launches


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
    case = Case([{"params": params((1,), seed=n), "momentum": 0.9} for n in range(465)])
    case.step(case.some_grads())
    case.step([None] * 465)
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [3, 2]


# ---------------------------------------------------------------------- changed copies of the kernel


def changed_kernel(changes: dict[str, str], *, few_types: bool = False) -> list[str]:
    """Flags by which kernel_main.cpp includes a copy of the kernel in which texts are replaced.

    Few types: only float32 and any mixture have loops of their own, which compiles in a third of
    the time.
    """
    names = ("sgdr_math.h", "static_switch.h", "tensor_list.h", "cuda/launch.h",
             "cuda/fused_step.cuh")  # fmt: skip
    sources = {name: (REPOSITORY / "csrc" / name).read_text() for name in names}
    for old, new in changes.items():
        (name,) = [name for name in names if old in sources[name]]
        assert sources[name].count(old) == 1, old
        sources[name] = sources[name].replace(old, new)
    if few_types:
        kernel = sources["cuda/fused_step.cuh"].splitlines(keepends=True)
        table = [i for i, line in enumerate(kernel) if line.strip().startswith("ElementTypes{k")]
        assert len(table) == 9
        sources["cuda/fused_step.cuh"] = "".join(l for i, l in enumerate(kernel) if i not in table)
    digest = hashlib.sha256("\0".join(sources.values()).encode()).hexdigest()[:16]
    folder = CACHE / f"kernel_{digest}"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(text)
    return [f'-DKERNEL_HEADER="{folder}/cuda/fused_step.cuh"']


SMALL = {
    "kMaxPieceNumel = 1u << 31": "kMaxPieceNumel = 2 * kChunkNumel",
    "payload[32720]": "payload[400]",
}


def in_pieces() -> Case:
    """A parameter's pieces lie in several launches; its flag must outlast all but the last."""
    case = Case([{"params": params((8192, 30000, 5)), "momentum": 0.9, "dampening": 0.1}])
    case.steps(2)
    return case


def test_a_tensor_too_large_for_one_entry(tmp_path) -> None:
    """Where an entry takes 8192 elements, and a launch seven entries."""
    flags = changed_kernel(SMALL, few_types=True)
    program = shim_program(FOLDER / "kernel_main.cpp", sanitize=ADDRESS, flags=flags)
    case = in_pieces()
    assert case.difference(program, tmp_path) == ""
    assert case.launches == [1, 1]
