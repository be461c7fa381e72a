"""Clipping, averaging, low-precision momentum on the CPU: torch's functions against one pass.

max_grad_norm is three quarters of the gradients' norm, so that every step clips. The torch side
clips with clip_grad_norm_(foreach=True), which writes the gradients, steps with SGD and its
scheduler, and averages with the foreach function that torch.optim.swa_utils uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import shapes
from benchmarks.harness import Build, Settings, Step, Workload, fused_sgdr, measure, parse_settings
from benchmarks.report import write_results
from benchmarks.step import NATIVE, Case, compare, draw, pair

EMA_DECAY = 0.999
# torch sums the squares in float32.
NORM_EPS = 16 * torch.finfo(torch.float32).eps


def cases(settings: Settings) -> dict[str, Case]:
    """The tensor lists and numbers of threads."""
    threads = torch.get_num_threads()
    n_small = 20 if settings.quick else 1000
    resnet = shapes.resnet50(width=4, n_classes=10) if settings.quick else shapes.resnet50()
    narrow = " of width 4" if settings.quick else ""
    return {
        "resnet": Case(f"ResNet-50{narrow}, 161 tensors", resnet, threads),
        "small": Case(f"{n_small} tensors of 64 elements", shapes.small_tensors(n_small), threads),
        "one thread": Case(f"{n_small} tensors of 64 elements", shapes.small_tensors(n_small), 1),
    }


def torchs_own(max_grad_norm: float, **how: bool) -> Build:
    """Builds clip, step, schedule and average; passes ``how`` to torch.optim.SGD."""

    def build(params: list[Tensor]) -> tuple[Optimizer, Step]:
        sgd, update = pair(**how)(params)
        averages: list[Tensor] = []

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, max_grad_norm, foreach=True)
            update()
            if averages:
                torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)
            else:
                averages.extend(param.clone() for param in params)
                for param, average in zip(params, averages, strict=True):
                    sgd.state[param]["ema"] = average

        return sgd, step

    return build


def run_clip_step_average(
    case: Case, settings: Settings, by_backward: bool = False
) -> dict[str, Any]:
    """Measures clip, step and average, with adjacent gradients or those of a backward()."""
    # Kept alive, so that the measured workload is not allocated in the gaps it would leave.
    same = Workload(case.shapes)
    max_grad_norm = 0.75 * math.sqrt(sum(float(param.grad.square().sum()) for param in same.params))
    options = {"max_grad_norm": max_grad_norm, "ema_decay": EMA_DECAY}
    workload = Workload(case.shapes, by_backward=by_backward, **options)
    builds: dict[str, Build] = {
        "clip, SGD(foreach=True), EMA": torchs_own(max_grad_norm, foreach=True),
        "clip, SGD(fused=True), EMA": torchs_own(max_grad_norm, fused=True),
        NATIVE: lambda params: fused_sgdr(params, **options),
    }
    candidates = [
        workload.candidate(name, case.threads, build, momentum_eps=NORM_EPS)
        for name, build in builds.items()
    ]
    *baselines, native = measure(candidates, settings).values()
    title = f"clip + step + EMA: {case.title}" + ", from backward()" * by_backward
    return compare(Case(title, case.shapes, case.threads), baselines, [*baselines, native], native)


def run_momentum_dtype(case: Case, settings: Settings) -> dict[str, Any]:
    """Measures the plain step with momentum buffers in bfloat16."""
    workload = Workload(case.shapes)
    candidates = [
        workload.candidate("SGD(foreach=True)", case.threads, pair(foreach=True)),
        workload.candidate("SGD(fused=True)", case.threads, pair(fused=True)),
        workload.candidate(NATIVE, case.threads, fused_sgdr),
        workload.candidate(
            f"{NATIVE}, momentum in bfloat16",
            case.threads,
            lambda params: fused_sgdr(params, momentum_dtype=torch.bfloat16),
            momentum_dtype=torch.bfloat16,
        ),
    ]
    *baselines, plain, native = measure(candidates, settings).values()
    title = f"momentum in bfloat16: {case.title}"
    return compare(
        Case(title, case.shapes, case.threads), baselines, [*baselines, plain, native], native
    )


def run_each_option(case: Case, settings: Settings) -> dict[str, Any]:
    """Measures what each option adds to the plain step."""
    workload = Workload(case.shapes)
    options: dict[str, dict[str, Any]] = {
        NATIVE: {},
        f"{NATIVE}, max_grad_norm": {"max_grad_norm": 1e9},
        f"{NATIVE}, ema_decay": {"ema_decay": EMA_DECAY},
    }

    def build_with(more: dict[str, Any]) -> Build:
        return lambda params: fused_sgdr(params, **more)

    candidates = [
        workload.candidate(name, case.threads, build_with(more), **more)
        for name, more in options.items()
    ]
    plain, *others = measure(candidates, settings).values()
    title = f"each option: {case.title}"
    return compare(Case(title, case.shapes, case.threads), others, [plain, *others], plain)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases; writes one_pass.json and one_pass.png."""
    settings = parse_settings(argv, __doc__)
    measured = cases(settings)
    results = [
        run_clip_step_average(measured["resnet"], settings),
        run_clip_step_average(measured["small"], settings),
        run_clip_step_average(measured["small"], settings, by_backward=True),
        run_clip_step_average(measured["one thread"], settings),
        run_momentum_dtype(measured["resnet"], settings),
        run_each_option(measured["resnet"], settings),
        run_each_option(measured["small"], settings),
    ]
    write_results(settings, "one_pass", {"cases": results}, draw(results))


if __name__ == "__main__":
    main()
