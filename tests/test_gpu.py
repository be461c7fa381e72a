"""On a GPU, by `pytest -m gpu`: the scenarios that cuda_on_cpu/test_path.py runs without one, and
tests that need torch's own kernels. `compute-sanitizer --tool memcheck` works too.
"""

import cuda_scenarios
import pytest
import torch
from cuda_scenarios import (
    OPTIONS,
    SCENARIOS,
    SCHEDULE,
    both,
    give_gradients,
    on_gpu,
    params_of,
    step,
    unsynchronised,
)
from pair import make_params

from benchmarks.gpu import device_events
from sgdr_fused import FusedSGDR, native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cuda_scenarios.IS_FAKE, reason="there is no GPU"
    ),
    pytest.mark.skipif(
        native.extension is None or not native.extension.has_cuda,
        reason=native.why_missing or "the extension is built without its CUDA backend",
    ),
]


@pytest.mark.parametrize("name", SCENARIOS)
def test_gpu_equals_the_cpu(name):
    SCENARIOS[name]()


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    cuda_scenarios.two_devices()


@pytest.mark.parametrize(("tensors", "launches"), [(1, 1), (161, 1), (640, 1), (641, 2), (2000, 4)])
def test_launches(tensors, launches):
    gpu = FusedSGDR(on_gpu(make_params([5] * tensors)), **OPTIONS, **SCHEDULE, backend="native")
    give_gradients(0, gpu)
    gpu.step()
    kernels = [event.name for event in device_events(gpu.step, "cuda") if event.is_launch]
    assert len(kernels) == launches
    assert all("fused_step_kernel" in name for name in kernels)


def test_grad_scaler_may_skip_the_first_step():
    """torch's fused SGD then has uninitialised momentum, and NaN after the next step."""
    expected, gpu = both((4, 300))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4, growth_interval=1000)
    for i in range(6):
        give_gradients(i, expected, gpu)
        scaler.scale(torch.zeros((), device="cuda"))
        scale = scaler.get_scale()
        for param in params_of(gpu):
            param.grad.mul_(scale)
        if i == 0:
            params_of(gpu)[1].grad[7] = torch.inf
        scaler.step(gpu)
        scaler.update()
        expected.found_inf = torch.full((), float(i == 0))  # as the scaler tells an optimizer
        expected.step()
        cuda_scenarios.assert_equal(expected, gpu, i)
        assert gpu.skipped_steps == 1
    assert scaler.get_scale() == 2.0**3


def test_steps_on_many_streams_with_an_optimizer_each():
    sides = [both((5, 70_000)) for _ in range(8)]
    streams = [torch.cuda.Stream() for _ in sides]
    for i in range(10):
        for cpu, gpu in sides:
            give_gradients(i, cpu, gpu)
            cpu.step()
        torch.cuda.synchronize()
        for (_, gpu), stream in zip(sides, streams, strict=True):
            with torch.cuda.stream(stream):
                step(gpu)
        torch.cuda.synchronize()
    for cpu, gpu in sides:
        cuda_scenarios.assert_equal(cpu, gpu)


def test_whole_training_step_in_a_graph():
    """Forward, backward and step in one graph, replayed over restarts, equal the eager ones."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 1)).cuda()
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [FusedSGDR(m.parameters(), **OPTIONS, **SCHEDULE) for m in models]
    x = torch.randn(64, 20, device="cuda")

    def train(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            train(models[1], optimizers[1])
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(models[1], optimizers[1])
    for _ in range(3):
        train(models[0], optimizers[0])
    for _ in range(20):
        train(models[0], optimizers[0])
        graph.replay()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert optimizers[1].get_last_lr() == optimizers[0].get_last_lr()
    assert optimizers[1].cycle == 3


def test_large_tensors_and_all_blocks():
    """Each block has several chunks, and there is a tail."""
    cpu, gpu = both((30_000_001, 12_345_678))
    for i in range(3):
        give_gradients(i, cpu, gpu)
        cpu.step()
        with unsynchronised():
            gpu.step()
    cuda_scenarios.assert_equal(cpu, gpu)
