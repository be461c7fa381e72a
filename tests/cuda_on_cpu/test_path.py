"""The whole CUDA path, from FusedSGDR to the kernel, on the fake CUDA runtime."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from fake_cuda import FOLDER, REPOSITORY, host_kernels, python, report, require_cuda_torch, run

TESTS = REPOSITORY / "tests"


def _names() -> tuple[list[str], list[str]]:
    """The names of all scenarios, and of those without a graph. Parsed: torch may differ here."""
    tree = ast.parse((TESTS / "cuda_scenarios.py").read_text())
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "scenario" for d in node.decorator_list)
    ]
    return names, [name for name in names if "graph" not in name]


ALL, NO_GRAPH = _names()

# As pytest runs them on a GPU: a warning is an error, and no scenario leaves a mode on.
RUN_SCENARIOS = """
import sys, traceback, warnings
import torch
import runtime_log as log
import cuda_scenarios
warnings.simplefilter("error")
for name in sys.argv[1:]:
    try:
        getattr(cuda_scenarios, name)()
        assert torch.cuda.get_sync_debug_mode() == 0
        log.report(**{name: ""})
    except BaseException:  # pytest's failures too
        log.report(**{name: traceback.format_exc()})
"""


def options(**more: Any) -> dict[str, Any]:
    """Options of run() for scripts that use FusedSGDR's CUDA backend."""
    require_cuda_torch()
    return {
        "kernels": [host_kernels(FOLDER / "step_host_kernels.cpp")],
        "environment": {"PYTHONPATH": f"{FOLDER}:{TESTS}:{REPOSITORY}"},
        "timeout": 400,
        **more,
    }


def require_cuda_extension() -> None:
    """Skips the test unless the extension is built with its CUDA backend."""
    check = "from sgdr_fused.native import extension as e; exit(e is None or not e.has_cuda)"
    if run(check, **options()).returncode != 0:
        pytest.skip(f"the extension of {python()} is built without its CUDA backend")


@pytest.fixture(scope="module", autouse=True)
def _built_for_cuda() -> None:
    require_cuda_extension()


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    return report(RUN_SCENARIOS, *ALL, **options())


@pytest.mark.parametrize("name", ALL)
def test_gpu_equals_the_cpu(errors: dict[str, str], name: str) -> None:
    assert errors[name] == ""


@pytest.fixture(scope="module")
def errors_guarded() -> dict[str, str]:
    # In reverse order, so that another scenario gets the warnings that torch gives once.
    names = [name for name in reversed(NO_GRAPH) if name != "two_thousand_tensors"]
    return report(RUN_SCENARIOS, *names, **options(guard=True, seed=2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in NO_GRAPH if name != "two_thousand_tensors"])
def test_scenario_stays_within_bounds(errors_guarded: dict[str, str], name: str) -> None:
    assert errors_guarded[name] == ""


@pytest.fixture(scope="module")
def errors_deferred() -> dict[str, str]:
    names = ["eager", "options_change_between_steps", "overflow_at_step_1", "layouts"]
    return report(RUN_SCENARIOS, *names, **options(deferred=True, seed=3))


@pytest.mark.exhaustive
def test_device_may_lag_far_behind_the_host(errors_deferred: dict[str, str]) -> None:
    assert set(errors_deferred.values()) == {""}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["graph_of_what_it_cannot_repeat", "eager"])
def test_scenario_passes_as_the_first_of_its_process(name: str) -> None:
    """Each of them gets a warning that torch gives once."""
    assert report(RUN_SCENARIOS, name, **options()) == {name: ""}


@pytest.mark.exhaustive
def test_failing_scenario_leaves_nothing_switched_on() -> None:
    found = report(
        """
import runtime_log as log
import torch
from cuda_scenarios import unsynchronised

def failure(wait):
    x = torch.zeros(3, device="cuda")
    try:
        with unsynchronised():
            wait(x)
    except (AssertionError, RuntimeError) as error:
        return type(error).__name__, torch.cuda.get_sync_debug_mode()

log.report(by_torch=failure(torch.Tensor.item),
           by_another=failure(lambda x: torch.cuda.synchronize()))
""",
        **options(),
    )
    # torch refuses its own copies to the host; of the rest only the fake runtime knows.
    assert found == {"by_torch": ["RuntimeError", 0], "by_another": ["AssertionError", 0]}


def test_each_of_two_devices_has_its_own_launch() -> None:
    assert report(RUN_SCENARIOS, "two_devices", **options(devices=2)) == {"two_devices": ""}


def test_scheduler_view_waits_for_the_step_before_only() -> None:
    """A trainer that asks for the LR at each step leaves the GPU the step that it has launched."""
    found = report(
        """
import torch, runtime_log as log
from sgdr_fused import FusedSGDR
from sgdr_fused.trainers import as_scheduler

param = torch.nn.Parameter(torch.zeros(3, device="cuda"))
param.grad = torch.zeros(3, device="cuda")
optimizer = FusedSGDR([param], lr=0.1, T_0=2)
view = as_scheduler(optimizer)
log.set_deferred(True)
optimizer.step()
view.step()
optimizer.step()
log.clear()
lr = view.get_last_lr()
log.report(waits=[call.name for call in log.synchronizing()], pending=log.pending(), lr=lr)
view.step()
log.report(next_lr=view.get_last_lr(), left=log.pending())
""",
        **options(),
    )
    assert found["waits"] == ["cudaEventSynchronize"]
    assert found["pending"] == 1  # the second step
    assert found["lr"] == [0.1 / 2]
    assert (found["next_lr"], found["left"]) == ([0.1], 0)


STEPS = """
import torch, runtime_log as log
from sgdr_fused import FusedSGDR

def step(tensors, numel=3, groups=1, with_gradient=True, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.zeros(numel, device="cuda", dtype=dtype))
              for _ in range(tensors)]
    for param in params:
        param.grad = torch.zeros_like(param) if with_gradient else None
    in_groups = [{"params": params[i::groups]} for i in range(groups)]
    optimizer = FusedSGDR(in_groups, lr=0.1, momentum=0.9, T_0=2, backend="native", **options)
    optimizer.step()
    torch.cuda.synchronize()
    log.clear()
    optimizer.step()
    return log.calls()
"""


def test_number_of_launches_and_runtime_calls() -> None:
    found = report(
        STEPS
        + """
# Cheap queries that do not synchronize.
QUERIES = ("cudaGetDevice", "cudaSetDevice", "cudaStreamIsCapturing", "cudaStreamGetCaptureInfo",
           "cudaGetLastError", "cudaPeekAtLastError")

def calls(*arguments, **options):
    all_calls = step(*arguments, **options)
    launches = [c for c in all_calls if c.is_launch]
    ours = [c for c in launches if "fused_step" in c.fields["kernel"]]
    others = [c.name for c in all_calls if not c.is_launch and not c.name.startswith(QUERIES)]
    return len(ours), len(launches), others

log.report(one=calls(1), none=calls(3, with_gradient=False), resnet=calls(161),
           full=calls(640), fuller=calls(641), groups=calls(636, groups=2), more=calls(2000),
           averaged=calls(457, ema_decay=0.9), clipped=calls(640, max_grad_norm=1.0),
           rounded=calls(640, dtype=torch.bfloat16, stochastic_rounding=True),
           long_norm=calls(1621, max_grad_norm=1.0))
""",
        **options(),
    )
    for name in ("one", "none", "resnet", "full", "groups", "averaged", "rounded"):
        assert found[name] == [1, 1, []], name
    assert found["fuller"] == [2, 2, []]
    assert found["more"] == [4, 4, []]
    # The norm, then the step.
    assert found["clipped"] == [1, 2, []]
    assert found["long_norm"] == [3, 5, []]


def test_a_launch_takes_few_argument_bytes_and_one_block_a_chunk() -> None:
    found = report(
        STEPS
        + """
def launches(*arguments, **options):
    return [[int(c.fields["argument_bytes"]), int(c.fields["grid"].split(",")[0])]
            for c in step(*arguments, **options) if c.is_launch]

log.report(mlp=launches(6), resnet=launches(161), more=launches(641), chunks=launches(2, 8193),
           averaged=launches(6, ema_decay=0.9), clipped=launches(6, 4097, max_grad_norm=1.0))
""",
        **options(),
    )
    # One block more computes the next LR.
    assert found["mlp"] == [[1024, 6 + 1]]
    assert found["resnet"] == [[10240, 161 + 1]]
    assert found["more"] == [[25808, 640 + 1], [1024, 1 + 1]]
    assert found["chunks"] == [[1024, 6 + 1]]
    assert found["averaged"] == [[25808, 6 + 1]]
    # A warp takes a chunk of the norm, and a block has eight.
    assert found["clipped"] == [[1024, 2], [1024, 12 + 1]]
