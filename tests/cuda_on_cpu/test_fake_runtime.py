"""The fake CUDA runtime does what a GPU's does, as far as tests of an optimizer can see."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import pytest
from fake_cuda import FOLDER, cuda_library, host_kernels, report, require_cuda_torch, run

pytestmark = pytest.mark.exhaustive

# `launch(y, x)` calls the toy kernel, which nvcc has compiled, on torch's current stream.
TOY = """
import ctypes, os, sys
import torch
import runtime_log as log

library = ctypes.CDLL(sys.argv[1])
n = 1003
RIGHT, OUT_OF_BOUNDS, DIVERGENT, NO_HOST_VERSION = 0, 1, 10, 12
DEFAULT = 0  # the stream
kernel = "saxpy_and_sum_kernel"
block_sums, total = torch.zeros(4, device="cuda"), torch.zeros((), device="cuda")
ticket = torch.zeros((), dtype=torch.int32, device="cuda")
x_cpu, y_cpu = (torch.arange(n) % 7).float(), (torch.arange(n) % 5).float()
x, y = x_cpu.to("cuda"), y_cpu.to("cuda")

def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())

def launch(y, x, bug=RIGHT, stream=None):
    stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
    return library.toy_launch(address(y), address(x), ctypes.c_float(2), n, address(block_sums),
                              address(total), address(ticket), ctypes.c_void_p(stream), bug)

def is_sum_of(y_expected):
    return bool(torch.equal(y.cpu(), y_expected) and total.item() == y_expected.sum().item())

def outcome(action):
    "The exit status of a fork, which `action` gives, or the signal it dies of. Without torch.cuda."
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def toy_options() -> dict[str, Any]:
    return {"kernels": [host_kernels(FOLDER / "toy_host_kernels.cpp")]}


def report_of_toy(script: str, **options: Any) -> dict[str, Any]:
    require_cuda_torch()
    library = cuda_library(FOLDER / "toy_launcher.cu")
    return report(TOY + script, library, **toy_options(), **options)


def run_toy(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    require_cuda_torch()
    library = cuda_library(FOLDER / "toy_launcher.cu")
    return run(TOY + script, library, **toy_options(), **options)


def test_torch_fills_and_copies() -> None:
    found = report("""
import torch, runtime_log as log
assert torch.cuda.is_available() and torch.cuda.device_count() == 1
dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64,
          torch.uint8, torch.bool]
wrong = []
def same(name, cuda, cpu):
    if not torch.equal(cuda.cpu(), cpu): wrong.append(name)
for dtype in [*dtypes, torch.complex64]:
    cpu = torch.arange(24).remainder(5).to(dtype).view(2, 3, 2, 2)
    cuda = cpu.to("cuda")
    assert cuda.is_cuda
    zeros, one = torch.zeros(37, dtype=dtype), torch.ones((), dtype=dtype)
    same(f"zeros {dtype}", torch.zeros(37, dtype=dtype, device="cuda"), zeros)
    same(f"full {dtype}", torch.full((), 1, dtype=dtype, device="cuda"), one)
    same(f"zeros_like {dtype}", torch.zeros_like(cuda), torch.zeros_like(cpu))
    same(f"clone {dtype}", cuda.clone(), cpu)
    same(f"strided fill {dtype}", cuda.clone()[:, ::2].fill_(1), cpu.clone()[:, ::2].fill_(1))
    same(f"strided copy {dtype}", cuda[:, 1:].mT.contiguous(), cpu[:, 1:].mT)
    channels_last = cuda.to(memory_format=torch.channels_last)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    same(f"channels_last {dtype}", channels_last, cpu)
    for other in dtypes:
        if not dtype.is_complex:
            same(f"{dtype} to {other}", cuda.to(other), cpu.to(other))
wrong_before = list(wrong)
same("a comparison that must fail", torch.ones(3, device="cuda"), torch.zeros(3))
log.report(wrong=wrong_before, fails=len(wrong) - len(wrong_before),
           fresh=torch.empty(10_000_000, device="cuda").cpu().isnan().all().item())
""")
    assert found == {"wrong": [], "fails": 1, "fresh": True}


@pytest.fixture(scope="module")
def eager() -> dict[str, Any]:
    return report_of_toy("""
log.clear()
error = launch(y, x)
launched = log.launches(kernel)
log.report(error=error, launches=len(launched), all_launches=len(log.launches()),
           fields=launched[0].fields, synchronizing=len(log.synchronizing()),
           copies=len(log.copies()))
log.report(right=is_sum_of(y_cpu + 2 * x_cpu), d2h_copies=len(log.copies("D2H")),
           synchronizing_after_item=len(log.synchronizing()))

stream = torch.cuda.Stream()
log.clear()
with torch.cuda.stream(stream):
    launch(y, x)
log.report(on_stream=log.launches(kernel)[0].fields["stream"])
stream.synchronize()
log.report(sync_names=[call.name for call in log.synchronizing()],
           right_on_stream=is_sum_of(y_cpu + 4 * x_cpu))

log.clear()
log.report(without_host_version=launch(y, x, NO_HOST_VERSION),
           unchanged=is_sum_of(y_cpu + 4 * x_cpu))
""")


def test_launch_runs_the_host_version(eager: dict[str, Any]) -> None:
    assert eager["error"] == 0
    assert eager["right"]
    assert eager["launches"] == eager["all_launches"] == 1
    assert eager["fields"]["grid"] == "4,1,1"
    assert eager["fields"]["block"] == "64,1,1"
    assert eager["fields"]["stream"] == "0"


def test_launch_neither_copies_nor_synchronises(eager: dict[str, Any]) -> None:
    assert eager["synchronizing"] == eager["copies"] == 0


def test_copies_to_the_host_and_synchronisations_are_logged(eager: dict[str, Any]) -> None:
    assert eager["d2h_copies"] == 2
    assert eager["synchronizing_after_item"] > 0
    assert eager["sync_names"] == ["cudaStreamSynchronize"]


def test_launch_uses_the_current_stream(eager: dict[str, Any]) -> None:
    assert eager["on_stream"] != "0"
    assert eager["right_on_stream"]


def test_kernel_without_a_host_version_is_an_error(eager: dict[str, Any]) -> None:
    assert eager["without_host_version"] == 98  # cudaErrorInvalidDeviceFunction
    assert eager["unchanged"]


def test_graph_replays_with_changed_inputs() -> None:
    found = report_of_toy("""
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    log.clear()
    launch(y, x)
    launched = log.launches(kernel)
log.report(captured=launched[0].fields["captured"], ran_at_capture=not torch.equal(y.cpu(), y_cpu))
log.clear()
graph.replay()
first = y.cpu()
x.copy_(x_cpu + 1)
graph.replay()
graph.replay()
log.report(replays=[call.fields["kernels"] for call in log.calls("cudaGraphLaunch")],
           launches=len(log.launches()), first=torch.equal(first, y_cpu + 2 * x_cpu),
           last=is_sum_of(first + 4 * (x_cpu + 1)))
""")
    assert found["captured"] == "1"
    assert not found["ran_at_capture"]
    assert found["replays"] == ["1", "1", "1"]
    assert found["launches"] == 0
    assert found["first"]
    assert found["last"]


@pytest.mark.parametrize(
    "call",
    ["torch.cuda.synchronize()", "torch.cuda.current_stream().synchronize()", "total.item()"],
)
def test_synchronising_in_a_capture_is_an_error(call: str) -> None:
    ran = run_toy(f"""
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    launch(y, x)
    {call}
""")
    assert ran.returncode == 1
    assert "operation not permitted when stream is capturing" in ran.stderr


def test_deferred_work_waits_for_a_synchronisation() -> None:
    found = report_of_toy(
        """
torch.cuda.synchronize()
log.clear()
launch(y, x)  # its arguments change on the host before it runs
pinned = torch.ones(n).pin_memory()
pageable = torch.ones(n)
from_pinned, from_pageable = torch.empty(n, device="cuda"), torch.empty(n, device="cuda")
from_pinned.copy_(pinned, non_blocking=True)
log.report(pending=log.pending(), synchronizing=len(log.synchronizing()))
pinned.fill_(2)  # too early: the copy has not run
torch.cuda.synchronize()
log.report(left=log.pending(), right=is_sum_of(y_cpu + 2 * x_cpu), stale=from_pinned[0].item())
""",
        deferred=True,
    )
    assert found == {"pending": 2, "synchronizing": 0, "left": 0, "right": True, "stale": 2.0}


def test_host_cannot_read_device_memory_and_a_failed_kernel_is_remembered() -> None:
    found = report_of_toy("""
runtime = ctypes.CDLL(None)
def synchronize_after_failure():
    launch(y, x, DIVERGENT, DEFAULT)
    return runtime.cudaDeviceSynchronize() % 256
log.report(
    host_read=outcome(lambda: ctypes.string_at(x.data_ptr(), 1)[0]),
    overrun=outcome(lambda: launch(y, x, OUT_OF_BOUNDS, DEFAULT)),
    divergent=outcome(lambda: launch(y, x, DIVERGENT, DEFAULT) % 256),
    afterwards=outcome(synchronize_after_failure))
""")
    assert found["host_read"] == -signal.SIGSEGV
    assert found["overrun"] == 0  # into the next tensor; the next test has it guarded
    assert found["divergent"] == found["afterwards"] == 719 % 256  # cudaErrorLaunchFailure


def test_overrun_of_a_guarded_tensor_faults() -> None:
    found = report_of_toy(
        """
n = 1004  # ends at a multiple of 16 bytes
x, y = (torch.zeros(n).to("cuda") for _ in range(2))
runtime = ctypes.CDLL(None)
log.report(right=outcome(lambda: launch(y, x, RIGHT, DEFAULT)),
           overrun=outcome(lambda: launch(y, x, OUT_OF_BOUNDS, DEFAULT)))
n = 1003
x = torch.ones(1008).to("cuda")
y = torch.zeros(n).to("cuda")
def free_after_overrun():
    launch(y, x, OUT_OF_BOUNDS, DEFAULT)
    return runtime.cudaFree(address(y))
log.report(free=outcome(lambda: runtime.cudaFree(address(y))),
           overrun_by_one=outcome(free_after_overrun))
""",
        guard=True,
    )
    assert found["right"] == 0
    assert found["overrun"] == -signal.SIGSEGV
    assert found["free"] == 0
    assert found["overrun_by_one"] == -signal.SIGABRT


def test_each_of_two_devices_has_its_own_memory_and_streams() -> None:
    found = report_of_toy(
        """
assert torch.cuda.device_count() == 2
there = [torch.empty_like(t, device="cuda:1").copy_(t) for t in (x, y)]
log.report(values=torch.equal(there[0].cpu(), x_cpu))
stream_there = torch.cuda.Stream(device=1).cuda_stream
log.report(wrong_memory=outcome(lambda: launch(there[1], there[0], RIGHT, DEFAULT)),
           wrong_stream=outcome(lambda: launch(y, x, RIGHT, stream_there) % 256))
""",
        devices=2,
    )
    assert found["values"]
    assert found["wrong_memory"] == -signal.SIGSEGV
    assert found["wrong_stream"] == 400 % 256  # cudaErrorInvalidResourceHandle
