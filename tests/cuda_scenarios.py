"""Scenarios for the CUDA backend, run on a GPU (test_gpu.py) and on the fake CUDA runtime
(cuda_on_cpu/test_path.py). Each raises if the GPU's results differ from the CPU backend's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from pair import draw, make_params
from torch import Tensor

from sgdr_fused import CosineWarmRestarts, FusedSGDR
from sgdr_fused.trainers import as_scheduler

IS_FAKE = "FAKE_CUDA_KERNELS" in os.environ
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
SCHEDULE = {"T_0": 3, "T_mult": 2, "eta_min": 1e-3}
SIZES = (1, 7, 0, 1003, 4096, 4097, 9000)
SCENARIOS: dict[str, Callable[[], None]] = {}
Params = list[torch.nn.Parameter]


def scenario(run: Callable[[], None]) -> Callable[[], None]:
    """Registers a scenario under its name."""
    SCENARIOS[run.__name__] = run
    return run


# ------------------------------------------------------------------------------------------- tools


def on_gpu(params: Params, device: str = "cuda") -> Params:
    """Equal parameters on a GPU."""
    return [torch.nn.Parameter(p.detach().to(device), p.requires_grad) for p in params]


def both(sizes=SIZES, **options) -> tuple[FusedSGDR, FusedSGDR]:
    """Two optimizers of equal parameters: on the CPU, on the GPU."""
    params = make_params(sizes)
    options = OPTIONS | SCHEDULE | options
    return (
        FusedSGDR(params, **options, backend="native"),
        FusedSGDR(on_gpu(params), **options, backend="native"),
    )


def params_of(optimizer: FusedSGDR) -> Params:
    """The parameters of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_gradients(step: int, *optimizers: FusedSGDR, but: tuple[int, ...] = ()) -> None:
    """Gives each side equal gradients, in the memory of those before; none to parameters `but`."""
    generator = torch.Generator().manual_seed(step)
    for i, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        grad = draw(params[0].shape, params[0].dtype, generator)
        for param in params:
            if i in but:
                param.grad = None
            elif param.grad is None:
                param.grad = grad.to(param.device, copy=True)
            else:
                param.grad.copy_(grad)


@contextlib.contextmanager
def without_warning(message: str) -> Iterator[None]:
    """Silences one harmless warning of torch's, which would be an error in a test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield


@contextlib.contextmanager
def unsynchronised(sends: bool = False) -> Iterator[None]:
    """Fails if the host waits for the GPU, or, unless `sends`, the GPU sends something to it."""
    try:
        # torch warns at the process's first call only, and has set the mode by then.
        with without_warning("Synchronization debug mode is a prototype"):
            torch.cuda.set_sync_debug_mode("error")
        with no_call_that_waits(sends) if IS_FAKE else contextlib.nullcontext():
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def no_call_that_waits(sends: bool) -> Iterator[None]:
    """The same on the fake runtime, which has logged all calls."""
    import runtime_log

    runtime_log.clear()
    yield
    # Without torch's caching allocator each tensor that goes is a cudaFree.
    expected = {"cudaFree"} if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ else set()
    waits = [call for call in runtime_log.synchronizing() if call.name not in expected]
    assert not waits, waits
    assert sends or not runtime_log.copies("D2H")


def step(*optimizers: FusedSGDR) -> None:
    """One step of each optimizer; the GPU's step does not synchronize."""
    for optimizer in optimizers:
        if all(param.is_cuda for param in params_of(optimizer)):
            with unsynchronised():
                optimizer.step()
        else:
            optimizer.step()


def captured(optimizer: FusedSGDR) -> torch.cuda.CUDAGraph:
    """A graph of one step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def assert_equal(cpu: FusedSGDR, gpu: FusedSGDR, where: object = "") -> None:
    """Parameters, momentum and schedules of the two are equal to the bit.

    But for float64 on a GPU, where the LR's cosine is another one than the host's. A few roundings
    of the cosine, near 1, are 100 times as many of the LR near eta_min, which is lr / 100.
    """
    ours, theirs = (optimizer.state_dict() for optimizer in (gpu, cpu))
    assert gpu.get_last_lr() == [group["lr"] for group in ours["param_groups"]], where
    assert gpu.cycle == cpu.cycle, where
    for i, (group, expected) in enumerate(
        zip(ours["param_groups"], theirs["param_groups"], strict=True)
    ):
        lr = group.pop("lr"), expected.pop("lr")
        assert lr[0] == lr[1] if IS_FAKE else math.isclose(*lr, rel_tol=1e-13), (where, i, lr)
        assert group == expected, (where, i)
    for i, (param, expected) in enumerate(zip(params_of(gpu), params_of(cpu), strict=True)):
        assert_same_values(param, expected, f"{where} param {i}")
        of_param, of_expected = (side["state"].get(i, {}) for side in (ours, theirs))
        assert of_param.keys() == of_expected.keys(), f"{where} state {i}"
        for name, value in of_param.items():
            if isinstance(value, Tensor):
                assert_same_values(value, of_expected[name], f"{where} {name} {i}")
            else:
                assert value == of_expected[name], f"{where} {name} {i}"
    if cpu.grad_norm is not None:
        assert gpu.grad_norm is not None, where
        norms = (optimizer.grad_norm.cpu().nan_to_num(-1.0) for optimizer in (gpu, cpu))
        assert_same_values(*norms, f"{where} grad_norm")


def assert_same_values(found: Tensor, expected: Tensor, where: str) -> None:
    """Whether two tensors are equal, on any devices."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if IS_FAKE or found.dtype not in (torch.float64, torch.complex128):
        assert torch.equal(found, expected), where
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def run_both(cpu: FusedSGDR, gpu: FusedSGDR, steps: range, **gradients) -> None:
    """Steps both on equal gradients and compares after each."""
    for i in steps:
        give_gradients(i, cpu, gpu, **gradients)
        step(cpu, gpu)
        assert_equal(cpu, gpu, f"after step {i}")


# --------------------------------------------------------------------------------------- scenarios


@scenario
def eager() -> None:
    """Every step of three cycles, with gradients that come late and go."""
    cpu, gpu = both()
    run_both(cpu, gpu, range(3), but=(1, 4))
    run_both(cpu, gpu, range(3, 8))
    run_both(cpu, gpu, range(8, 22), but=(0,))
    assert gpu.cycle == cpu.cycle == 3
    assert gpu.get_last_lr() == [float(gpu.param_groups[0]["lr"])]


@scenario
def several_groups_and_dtypes() -> None:
    """Options, schedules and types of several groups in one launch."""
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    own = (
        {},
        {"momentum": 0.0, "nesterov": False, "T_0": 2, "T_mult": 1},
        {"nesterov": False, "dampening": 0.3, "maximize": True, "warmup_steps": 4},
        {"decoupled_weight_decay": True, "reset_momentum": True},
        {"weight_decay": 0.0, "cycle_decay": 0.5, "n_cycles": 2},
        {"steps_per_epoch": 2, "anneal": "epoch"},
    )
    params = [[p for d in dtypes for p in make_params((5, 300), d, seed=i)] for i in range(6)]
    sides = [
        [{"params": side, **options} for side, options in zip(of_groups, own, strict=True)]
        for of_groups in (params, [on_gpu(of_group) for of_group in params])
    ]
    cpu, gpu = (FusedSGDR(side, **OPTIONS, **SCHEDULE, backend="native") for side in sides)
    run_both(cpu, gpu, range(14), but=(0, 9))
    gpu.add_param_group({"params": on_gpu(make_params((3, 4)))})
    cpu.add_param_group({"params": make_params((3, 4))})
    run_both(cpu, gpu, range(14, 20))


@scenario
def options_change_between_steps() -> None:
    """Options changed on the host apply from the next step."""
    cpu, gpu = both(SIZES[:4])
    run_both(cpu, gpu, range(2))
    for i, change in enumerate(
        [
            {"momentum": 0.5},
            {"lr": 0.03},
            {"eta_min": 0.01, "weight_decay": 0.0},
            {"initial_lr": 0.5},
            {"T_cur": 1},
            {"lr": torch.tensor(0.25)},
        ]
    ):
        for optimizer in (cpu, gpu):
            optimizer.param_groups[0].update(change)
        run_both(cpu, gpu, range(2 + 2 * i, 4 + 2 * i))
    cpu.param_groups[0]["lr"] = 0.125
    gpu.param_groups[0]["lr"] = torch.full((1,), 0.125, device="cuda")
    run_both(cpu, gpu, range(20, 22))
    gpu.param_groups[0]["lr"].fill_(0.375)  # in place, as a graph would see it
    cpu.param_groups[0]["lr"] = 0.375
    run_both(cpu, gpu, range(22, 24))


@scenario
def overflow_at_step_1() -> None:
    """A skipped step changes nothing, and the next is the first."""
    cpu, gpu = both()
    start = [param.detach().cpu() for param in params_of(gpu)]
    for i, overflows in enumerate([True, True, False, False, True, False, False]):
        give_gradients(i, cpu, gpu)
        for optimizer, device in ((cpu, "cpu"), (gpu, "cuda")):
            optimizer.grad_scale = torch.full((), 8.0, device=device)
            optimizer.found_inf = torch.full((), float(overflows), device=device)
        if overflows:
            params_of(gpu)[0].grad.fill_(math.inf)
            params_of(cpu)[0].grad.fill_(math.inf)
        if i == 4:
            for optimizer in (cpu, gpu):
                optimizer.param_groups[0]["eta_min"] = 2e-3
        step(cpu, gpu)
        if overflows:
            assert gpu.state_dict()["param_groups"][0]["step"] == max(0, i - 2)
        if i == 0:
            for param, before in zip(params_of(gpu), start, strict=True):
                assert torch.equal(param.detach().cpu(), before)
                assert not gpu.state[param]["momentum_buffer"].cpu().isnan().any()
            assert not any(map(len, gpu.state_dict()["state"].values()))
        if not overflows:
            assert_equal(cpu, gpu, i)


def _replay(cpu: FusedSGDR, gpu: FusedSGDR, graph: torch.cuda.CUDAGraph, steps: range) -> None:
    for i in steps:
        give_gradients(i, cpu, gpu)
        cpu.step()
        graph.replay()
        assert_equal(cpu, gpu, f"after replay {i}")


@scenario
def graph_captured_before_the_first_step() -> None:
    """The first replay is the first step; three restarts follow, and a plain step in between."""
    cpu, gpu = both()
    give_gradients(0, cpu, gpu)
    before = [param.detach().cpu() for param in params_of(gpu)]
    graph = captured(gpu)
    for param, value in zip(params_of(gpu), before, strict=True):
        assert torch.equal(param.detach().cpu(), value)
    assert_equal(cpu, gpu, "after the capture")
    _replay(cpu, gpu, graph, range(10))
    run_both(cpu, gpu, range(10, 12))
    _replay(cpu, gpu, graph, range(12, 30))
    assert gpu.cycle == cpu.cycle == 3


@scenario
def graph_captured_after_the_first_step() -> None:
    """Captured after warm-up steps, as in torch's examples; momentum is dropped at each restart."""
    cpu, gpu = both(reset_momentum=True)
    run_both(cpu, gpu, range(2))
    graph = captured(gpu)
    assert_equal(cpu, gpu, "after the capture")
    _replay(cpu, gpu, graph, range(2, 24))
    assert gpu.cycle == 3
    assert [gpu.is_cycle_end, cpu.is_cycle_end] == [False, False]


@scenario
def graph_with_two_captures_before_the_first_step() -> None:
    """The second capture finds buffers that hold nothing."""
    cpu, gpu = both()
    give_gradients(0, cpu, gpu)
    graphs = captured(gpu), captured(gpu)
    for i in range(8):
        _replay(cpu, gpu, graphs[1 - i % 2], range(i, i + 1))


@scenario
def graph_that_skips() -> None:
    """found_inf and grad_scale are read at each replay, the first one too."""
    cpu, gpu = both()
    for optimizer, device in ((cpu, "cpu"), (gpu, "cuda")):
        optimizer.grad_scale = torch.full((), 4.0, device=device)
        optimizer.found_inf = torch.ones((), device=device)
    give_gradients(0, cpu, gpu)
    graph = captured(gpu)
    for i, overflows in enumerate([1, 0, 0, 1, 0, 0, 0, 1, 0]):
        for optimizer in (cpu, gpu):
            optimizer.found_inf.fill_(overflows)
            optimizer.grad_scale.fill_(4.0 + i)
        _replay(cpu, gpu, graph, range(i, i + 1))


@scenario
def graph_and_the_host_in_turn() -> None:
    """restart() and seek() between replays, an option changed before the capture."""
    cpu, gpu = both(reset_momentum=True)
    run_both(cpu, gpu, range(1))
    for optimizer in (cpu, gpu):
        optimizer.param_groups[0]["eta_min"] = 5e-3
    graph = captured(gpu)
    _replay(cpu, gpu, graph, range(1, 4))
    for optimizer in (cpu, gpu):
        optimizer.restart()
    _replay(cpu, gpu, graph, range(4, 6))
    for optimizer in (cpu, gpu):
        optimizer.seek(20)
    assert gpu.get_last_lr() == cpu.get_last_lr()
    _replay(cpu, gpu, graph, range(6, 9))


@scenario
def hook_at_the_restarts() -> None:
    """The hook is called after the same steps as on the CPU, and not again for a skipped step."""
    cpu, gpu = both()
    seen: tuple[list[int], ...] = ([], [])
    for optimizer, steps in zip((cpu, gpu), seen, strict=True):
        optimizer.register_restart_hook(lambda o, steps=steps: steps.append(o.cycle))
    for i in range(11):
        give_gradients(i, cpu, gpu)
        for optimizer in (cpu, gpu):
            device = optimizer.param_groups[0]["params"][0].device
            optimizer.found_inf = torch.full((), float(i == 3), device=device)
            optimizer.step()  # which waits for the GPU, because of the hook
    for optimizer in (cpu, gpu):
        optimizer.restart()
    assert seen == ([1, 2, 3], [1, 2, 3])
    assert_equal(cpu, gpu)


@scenario
def scheduler_view_sends_the_lr() -> None:
    """Its step() does not wait. It shows the LR of its last step; a copy of it does, too."""
    cpu, gpu = both(SIZES[:2])
    shown, view = as_scheduler(cpu), as_scheduler(gpu)
    for i, overflows in enumerate([0, 0, 1, 0, 0, 0]):
        give_gradients(i, cpu, gpu)
        for optimizer, device in ((cpu, "cpu"), (gpu, "cuda")):
            optimizer.found_inf = torch.full((), float(overflows), device=device)
        step(cpu, gpu)
        assert view.get_last_lr() == pytest.approx(shown.get_last_lr(), rel=1e-13)
        shown.step()
        with unsynchronised(sends=True):
            view.step()
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        step(gpu)
        view.step()
        assert copied.get_last_lr() == pytest.approx(shown.get_last_lr(), rel=1e-13)
    gpu.add_param_group({"params": on_gpu(make_params((3,)))})
    view.step()
    assert view.get_last_lr() == gpu.get_last_lr()


@scenario
def schedule_on_the_host_needs_no_gpu() -> None:
    """CosineWarmRestarts.of_group() of a group on the GPU reads nothing from there."""
    cpu, gpu = both(SIZES[:2], warmup_steps=2)
    expected = []
    for i in range(6):
        give_gradients(i, cpu, gpu)
        expected += cpu.get_last_lr()
        step(cpu, gpu)
    with unsynchronised():
        schedule = CosineWarmRestarts.of_group(gpu.param_groups[0])
        assert [schedule.lr_at(i) for i in range(6)] == expected


@scenario
def graph_of_what_it_cannot_repeat() -> None:
    """An LR set by hand is an error in a capture: each replay would set it again."""
    for change in ("lr", "momentum_buffer", "device"):
        _, gpu = both((5,))
        if change == "device":
            params = make_params((5,))
            gpu = FusedSGDR(params, **OPTIONS, **SCHEDULE)
            params[0].data = params[0].data.cuda()
        give_gradients(0, gpu)
        if change != "device":
            gpu.step()
        if change == "lr":
            gpu.param_groups[0]["lr"] = 0.5
        if change == "momentum_buffer":
            gpu.state[params_of(gpu)[0]].clear()
        # The graph is empty because the step was refused.
        with (
            without_warning("The CUDA Graph is empty"),
            pytest.raises(RuntimeError, match="CUDA graph"),
        ):
            captured(gpu)


@scenario
def side_streams() -> None:
    """The step runs on the current stream."""
    cpu, gpu = both()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for i in range(9):
        give_gradients(i, cpu, gpu)
        cpu.step()
        stream = streams[i % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(gpu)
        torch.cuda.current_stream().wait_stream(stream)
        assert_equal(cpu, gpu, i)


@scenario
def layouts() -> None:
    """channels_last, strided and misaligned; gradients of another layout; complex numbers."""
    shape = (4, 3, 5, 6)

    def laid_out(x: Tensor) -> list[Tensor]:
        padded = torch.cat([torch.zeros(3, dtype=x.dtype, device=x.device), x.flatten()])
        return [
            x.to(memory_format=torch.channels_last),
            x.clone(),
            x.clone().transpose(0, 3),
            padded[3:].view(shape),
            torch.stack([x, x], -1)[..., 0],
        ]

    x, z = draw(shape, torch.float32, torch.Generator()), make_params((5,), torch.complex64)[0]
    # Laid out by the CPU: the fake runtime has few kernels.
    params = [torch.nn.Parameter(p) for p in laid_out(x)] + [z]
    theirs = []
    for p in params:
        there = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="cuda")
        if p.storage_offset():
            there = torch.empty(p.numel() + 3, device="cuda")[3:].view(shape)
        theirs.append(torch.nn.Parameter(there.copy_(p.detach())))
    cpu = FusedSGDR(params, **OPTIONS, **SCHEDULE, backend="native")
    gpu = FusedSGDR(theirs, **OPTIONS, **SCHEDULE, backend="native")
    run_both(cpu, gpu, range(7))


@scenario
def two_thousand_tensors() -> None:
    """More tensors than fit into one launch; groups are split over launches."""
    sides = [
        [{"params": make_params([1 + i % 9] * n)} for i, n in enumerate((800, 1150, 50))]
        for _ in range(2)
    ]
    for group in sides[1]:
        group["params"] = on_gpu(group["params"])
    cpu, gpu = (FusedSGDR(s, **OPTIONS, **SCHEDULE, backend="native") for s in sides)
    for i in range(5):
        give_gradients(i, cpu, gpu)
        step(cpu, gpu)
    assert_equal(cpu, gpu)


@scenario
def state_travels() -> None:
    """state_dict() by way of the CPU and back; deepcopy and pickle."""
    cpu, gpu = both(reset_momentum=True)
    run_both(cpu, gpu, range(2), but=(3,))
    saved = io.BytesIO()
    torch.save(gpu.state_dict(), saved)
    saved.seek(0)
    state_dict = torch.load(saved, weights_only=True, map_location="cpu")
    assert all(type(state_dict["param_groups"][0][k]) is int for k in ("step", "cycle", "T_i"))
    to_cpu, to_gpu = both(reset_momentum=True)
    for fresh, source in ((to_cpu, gpu), (to_gpu, cpu)):
        for param, value in zip(params_of(fresh), params_of(source), strict=True):
            param.detach().copy_(value.detach())
    to_cpu.load_state_dict(state_dict)
    to_gpu.load_state_dict(cpu.state_dict())
    copied = copy.deepcopy(gpu)
    pickled = pickle.loads(pickle.dumps(gpu))
    sides = [cpu, gpu, to_cpu, to_gpu, copied, pickled]
    for i in range(2, 9):
        give_gradients(i, *sides)
        step(*sides)
        for other in sides[1:]:
            assert_equal(cpu, other, f"{sides.index(other)} after step {i}")


@scenario
def pair_and_a_graph_and_back() -> None:
    """from_pair(), a capture at once, and to_pair()."""
    params = make_params(SIZES[:4])
    cpu = FusedSGDR(params, **OPTIONS, **SCHEDULE)
    give_gradients(0, cpu)
    cpu.step()
    sgd, scheduler = cpu.to_pair()
    theirs = on_gpu(params)
    there = torch.optim.SGD(theirs, **OPTIONS | {"lr": sgd.param_groups[0]["lr"]})
    there.param_groups[0]["initial_lr"] = OPTIONS["lr"]
    their_scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(there, **SCHEDULE)
    their_scheduler.load_state_dict(scheduler.state_dict())
    there.param_groups[0]["lr"] = sgd.param_groups[0]["lr"]
    for param, their in zip(params, theirs, strict=True):
        buffer = sgd.state[param]["momentum_buffer"]
        there.state[their]["momentum_buffer"] = buffer.to("cuda")
    gpu = FusedSGDR.from_pair(there, their_scheduler, backend="native")
    give_gradients(1, cpu, gpu)
    _replay(cpu, gpu, captured(gpu), range(1, 4))
    run_both(cpu, gpu, range(4, 8))
    back, back_scheduler = gpu.to_pair()
    assert back_scheduler.T_cur == gpu.state_dict()["param_groups"][0]["T_cur"]
    assert len(back.state) == len(theirs)


@scenario
def params_and_buffers_come_and_go() -> None:
    """Parameters moved to the GPU after construction; lists and state changed by hand."""
    params = make_params(SIZES)
    cpu = FusedSGDR([torch.nn.Parameter(p.detach().clone()) for p in params], **OPTIONS, **SCHEDULE)
    gpu = FusedSGDR(params, **OPTIONS, **SCHEDULE, backend="native")
    run_both(cpu, gpu, range(2))
    state_dict = gpu.state_dict()
    for param in params:
        param.grad = None
        param.data = param.data.cuda()
    gpu.load_state_dict(state_dict)
    run_both(cpu, gpu, range(2, 4))
    for optimizer in (cpu, gpu):
        group = optimizer.param_groups[0]["params"]
        del optimizer.state[group[0]]["momentum_buffer"]
        buffer = optimizer.state[group[3]]["momentum_buffer"]
        optimizer.state[group[3]]["momentum_buffer"] = buffer.clone().fill_(0.5)
    assert_equal(cpu, gpu, "changed by hand")
    run_both(cpu, gpu, range(4, 6))
    for optimizer in (cpu, gpu):
        group = optimizer.param_groups[0]["params"]
        group.insert(0, group.pop())
        device = group[0].device
        group.append(torch.nn.Parameter(make_params((33,))[0].detach().to(device)))
        optimizer.state.pop(group.pop(1))
    for i in range(6, 9):
        give_gradients(i, cpu, gpu)
        cpu.step()
        gpu.step()
        assert_equal(cpu, gpu, i)


@scenario
def params_move_without_a_word() -> None:
    """From the GPU to the CPU and back, with their buffers; the schedule's place goes along."""
    cpu, gpu = both(SIZES[:4])
    run_both(cpu, gpu, range(2))
    for i, device in enumerate(("cpu", "cuda")):
        for param in params_of(gpu):
            param.grad = None
            param.data = param.data.to(device)
            buffer = gpu.state[param]["momentum_buffer"]
            gpu.state[param]["momentum_buffer"] = buffer.to(device)
        give_gradients(10 + i, cpu, gpu)
        cpu.step()
        gpu.step()  # waits, this once
        assert int(gpu.param_groups[0]["step"]) == cpu.param_groups[0]["step"]
        assert isinstance(gpu.param_groups[0]["lr"], Tensor) == (device == "cuda")
        assert_equal(cpu, gpu, device)
        run_both(cpu, gpu, range(3 * i, 3 * i + 3))


@scenario
def bad_input() -> None:
    """An error changes nothing."""
    cpu, gpu = both(SIZES[:4])
    run_both(cpu, gpu, range(2))
    give_gradients(2, cpu, gpu)
    group = gpu.param_groups[0]
    for name, value, message in (
        ("momentum", -1.0, "momentum"),
        ("lr", math.nan, "learning rate"),
        ("T_cur", -5, "5 steps of warm-up"),
        ("eta_min", 3.0, "eta_min"),
    ):
        before = group[name]
        group[name] = value
        with pytest.raises(ValueError, match=message):
            gpu.step()
        group[name] = before
    param = params_of(gpu)[3]
    buffer = gpu.state[param]["momentum_buffer"]
    gpu.state[param]["momentum_buffer"] = buffer[:-1]
    with pytest.raises(ValueError, match="momentum_buffer of shape"):
        gpu.step()
    gpu.state[param]["momentum_buffer"] = buffer.cpu()
    with pytest.raises(ValueError, match="momentum_buffer of device"):
        gpu.step()
    gpu.state[param]["momentum_buffer"] = buffer
    assert_equal(cpu, gpu, "after the errors")
    run_both(cpu, gpu, range(2, 5))


@scenario
def hosts_and_gpus_together() -> None:
    """A group on the CPU beside one on the GPU, and a skipped step of both."""
    first, second = make_params((5, 300)), make_params((40, 7), seed=1)
    cpu = FusedSGDR(
        [{"params": [torch.nn.Parameter(p.detach().clone()) for p in g]} for g in (first, second)],
        **OPTIONS,
        **SCHEDULE,
    )
    mixed = FusedSGDR(
        [{"params": first}, {"params": on_gpu(second)}], **OPTIONS, **SCHEDULE, backend="native"
    )
    for i, overflows in enumerate([1, 0, 0, 1, 0, 0]):
        for optimizer, device in ((cpu, "cpu"), (mixed, "cuda")):
            optimizer.found_inf = torch.full((), float(overflows), device=device)
        run_both(cpu, mixed, range(i, i + 1))


def both_with_all_options(**options) -> tuple[FusedSGDR, FusedSGDR]:
    """Groups that together have every option of averaging, clipping and low precision."""
    groups = [
        (torch.float32, {"ema_decay": 0.9, "momentum_dtype": torch.bfloat16, "seed": 3}),
        (torch.bfloat16, {"ema_decay": "swa", "stochastic_rounding": True, "T_0": 2}),
        (torch.float16, {"master_weights": True, "reset_momentum": True, "T_mult": 1}),
        (torch.float32, {"maximize": True, "momentum_dtype": torch.float16, "ema_decay": "swa"}),
        (torch.float64, {"ema_decay": 0.5}),
        (torch.float16, {"momentum": 0.0, "nesterov": False, "stochastic_rounding": True}),
    ]
    sides = []
    for place in ("cpu", "cuda"):
        param_groups = [
            {"params": on_gpu(make_params(SIZES, dtype, seed), place), **of_group}
            for seed, (dtype, of_group) in enumerate(groups)
        ]
        sides.append(FusedSGDR(param_groups, **OPTIONS | SCHEDULE | options, backend="native"))
    return sides[0], sides[1]


@scenario
def one_pass() -> None:
    cpu, gpu = both_with_all_options(max_grad_norm=2.0)
    run_both(cpu, gpu, range(8))
    run_both(cpu, gpu, range(8, 10), but=(0, 9))
    for optimizer in (cpu, gpu):
        optimizer.max_grad_norm, optimizer.skip_nonfinite = None, True
    for attempt in range(10, 14):
        give_gradients(attempt, cpu, gpu)
        if attempt % 2 == 0:
            for optimizer in (cpu, gpu):
                params_of(optimizer)[5].grad[4096] = math.inf
        step(cpu, gpu)
        assert_equal(cpu, gpu, attempt)
    assert gpu.skipped_steps == 2


@scenario
def clipping_with_a_scaler() -> None:
    cpu, gpu = both_with_all_options(max_grad_norm=0.5)
    for attempt in range(6):
        for optimizer, device in ((cpu, "cpu"), (gpu, "cuda")):
            optimizer.grad_scale = torch.tensor(64.0, device=device)
            optimizer.found_inf = torch.tensor(float(attempt in (0, 3)), device=device)
        give_gradients(attempt, cpu, gpu)
        step(cpu, gpu)
        if attempt not in (0, 3):  # the CPU, which knows of the overflow, reads no gradients then
            assert_equal(cpu, gpu, attempt)
    assert gpu.skipped_steps == cpu.skipped_steps == 2


@scenario
def one_pass_travels() -> None:
    cpu, gpu = both_with_all_options(max_grad_norm=2.0)
    run_both(cpu, gpu, range(5))
    to_cpu, to_gpu = both_with_all_options(max_grad_norm=2.0)
    for target, source in ((to_cpu, gpu), (to_gpu, cpu)):
        with torch.no_grad():
            for param, value in zip(params_of(target), params_of(source), strict=True):
                param.copy_(value)
        target.load_state_dict(source.state_dict())
    run_both(to_cpu, to_gpu, range(5, 12))
    run_both(cpu, gpu, range(5, 12))
    for i, (param, expected) in enumerate(zip(params_of(to_gpu), params_of(cpu), strict=True)):
        assert_same_values(param, expected, f"param {i}")


@scenario
def averages_are_swapped_in() -> None:
    cpu, gpu = both(ema_decay=0.9)
    run_both(cpu, gpu, range(4))
    with cpu.swap_ema(), gpu.swap_ema():
        for i, (param, expected) in enumerate(zip(params_of(gpu), params_of(cpu), strict=True)):
            assert_same_values(param, expected, f"average {i}")
    assert_equal(cpu, gpu, "after the block")


@scenario
def graph_of_one_pass() -> None:
    cpu, gpu = both_with_all_options(max_grad_norm=2.0, skip_nonfinite=True)
    give_gradients(0, cpu, gpu)
    graph = captured(gpu)
    for attempt in range(20):
        give_gradients(attempt, cpu, gpu)
        if attempt in (0, 7, 8):
            for optimizer in (cpu, gpu):
                params_of(optimizer)[3].grad[-1] = math.nan
        cpu.step()
        graph.replay()
        assert_equal(cpu, gpu, attempt)
    assert gpu.skipped_steps == 3


@scenario
def one_parameter_at_a_time() -> None:
    cpu, gpu = both_with_all_options()
    for attempt in range(7):
        give_gradients(attempt, cpu, gpu)
        for optimizer in (cpu, gpu):
            for i, param in enumerate(params_of(optimizer)):
                if i % 3 != 2:
                    optimizer._step_param(i)
                    param.grad = None
        step(cpu, gpu)
        assert_equal(cpu, gpu, attempt)


@scenario
def norms_over_several_devices_are_refused() -> None:
    cpu, gpu = both()
    mixed = FusedSGDR(
        [{"params": params_of(cpu)}, {"params": params_of(gpu)}],
        **OPTIONS,
        **SCHEDULE,
        max_grad_norm=1.0,
        backend="native",
    )
    give_gradients(0, mixed)
    with pytest.raises(ValueError, match="on several devices"):
        mixed.step()


def two_devices() -> None:
    """A group on each of two GPUs, with either as the current device."""
    first, second = make_params((5, 300)), make_params((40, 7), seed=1)
    cpu = FusedSGDR(
        [{"params": [torch.nn.Parameter(p.detach().clone()) for p in g]} for g in (first, second)],
        **OPTIONS,
        **SCHEDULE,
    )
    gpu = FusedSGDR(
        [{"params": on_gpu(first, "cuda:1")}, {"params": on_gpu(second, "cuda:0")}],
        **OPTIONS,
        **SCHEDULE,
        backend="native",
    )
    for i in range(6):
        with torch.cuda.device(i % 2):
            run_both(cpu, gpu, range(i, i + 1))
    assert [group["lr"].device.index for group in gpu.param_groups] == [1, 0]
    with pytest.raises(ValueError, match="is on cuda:1, but"):
        FusedSGDR([*on_gpu(first, "cuda:0"), *on_gpu(second, "cuda:1")], **OPTIONS, **SCHEDULE)
