import importlib
import json
import math
import runpy
import time
from pathlib import Path

import pytest
import torch

from sgdr_fused import FusedSGDR
from sgdr_fused.native import extension, why_missing

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(extension is None, reason=why_missing)


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine, threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def benchmark():
    """Imports a module of benchmarks/."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def _only_ours_and_the_pair(monkeypatch, benchmark):
    """Leaves out what takes seconds to compile, to import or to start."""
    contestants, optax = benchmark("contestants"), benchmark("optax_process")
    monkeypatch.setattr(contestants, "c_compiler", lambda: None)
    monkeypatch.setattr(contestants, "LIBRARIES", {"none SGD": ("no_such_library", None)})

    def start(*_):
        raise optax.LeftOut("not in this test")

    monkeypatch.setattr(optax, "start", start)


@pytest.fixture
def small_buffers(monkeypatch, benchmark):
    """Cold calls of a test need not be cold."""
    monkeypatch.setattr(benchmark("harness"), "last_level_cache_bytes", lambda: 1 << 10)
    init = benchmark("harness").Clock.__init__

    def small(self, *args, **options):
        init(self, *args, **options)
        self._buffers = [buffer[: 1 << 16] for buffer in self._buffers]

    monkeypatch.setattr(benchmark("harness").Clock, "__init__", small)


def run_quickly(name, out, file=None, picture=True):
    """Runs a benchmark on tiny shapes and returns its JSON."""
    pytest.importorskip("matplotlib")
    module = importlib.import_module(f"benchmarks.{name}")
    module.main(["--quick", "--rounds", "2", "--out", str(out)])
    file = out / f"{file or name}.json"
    if picture:
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(file.read_text())
    environment = results["environment"]
    assert {"cpu", "threads", "allocator", "torch", "commit", "peers", "date"} <= set(environment)
    assert environment["rounds"] == 2
    return results


def assert_is_a_timing(timing):
    low, high = timing["interval_us"]
    assert 0 < timing["fastest_us"] <= low <= timing["median_us"] <= high < math.inf
    assert timing["calls_per_timing"] >= 1


# -------------------------------------------------------------------------------------- the shapes


def test_resnet50_has_161_parameters_of_25557032_elements(benchmark):
    shapes = benchmark("shapes")
    resnet50 = shapes.resnet50()
    assert (len(resnet50), shapes.numel(resnet50)) == (161, 25_557_032)
    assert resnet50[0] == (64, 3, 7, 7)
    assert resnet50[-2:] == [(1000, 2048), (1000,)]


def test_mlp_has_6_parameters_of_ten_thousand_elements(benchmark):
    shapes = benchmark("shapes")
    assert (len(shapes.mlp()), shapes.numel(shapes.mlp())) == (6, 9674)


def test_param_groups_hold_each_parameter_once(benchmark):
    workload = benchmark("workload").Workload([(2,)] * 7, n_groups=3)
    assert [len(group["params"]) for group in workload.groups()] == [2, 2, 3]
    params = [param for group in workload.groups() for param in group["params"]]
    assert [id(param) for param in params] == [id(param) for param in workload.params]


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.usefixtures("_only_ours_and_the_pair", "small_buffers")
def test_steps_benchmark_times_every_form_of_the_pair_and_fills_the_pages(tmp_path):
    results = run_quickly("steps", tmp_path, "cpu")
    mlp, groups, resnet, whole = results["cases"]
    assert groups["groups"] == 5
    pairs = ["foreach=False", "foreach=True", "fused=True"]
    assert [entry["name"] for entry in mlp["candidates"]] == [
        "FusedSGDR",
        "FusedSGDR, reference",
        *(f"SGD({form}) + scheduler" for form in pairs),
        "SGD(fused=True), tensor LR + scheduler",
    ]
    assert set(mlp["left_out"].values()) == {
        "there is no C compiler",
        "not installed",
        "not in this test",
    }
    assert len(whole["candidates"]) == 3
    assert [entry["name"].partition(",")[0] for entry in resnet["candidates"]].count(
        "memory floor"
    ) == 1
    for case in results["cases"]:
        assert case["candidates"][0]["cold"]["ratio"] == 1
        for entry in case["candidates"]:
            assert_is_a_timing(entry["cold"])
            assert_is_a_timing(entry["hot"])

    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    for make in ("cpu", "cpu_cold", "cpu_hot", "one_pass", "each_option", "memory_floor"):
        table = tables["TABLES"][make]
        table.__globals__["RESULTS"] = tmp_path
        text = table()
        case, caches = (resnet, "hot") if make == "cpu_hot" else (resnet, "cold")
        if make != "memory_floor":
            name = "FusedSGDR, momentum in bfloat16" if make == "one_pass" else "FusedSGDR"
            ours = next(entry for entry in case["candidates"] if entry["name"] == name)
            assert tables["time"](ours[caches]["median_us"]) in text, make
        assert case["title"] in text
    assert "not installed | everywhere" in tables["left_out"]()
    assert tables["cpu_spread"]().count("pair, ") == 2 * 4  # cold and hot
    slow = next(e for e in resnet["candidates"] if e["name"] == "SGD(foreach=True) + scheduler")
    slow["cold"] |= {"ratio": 0.5, "ratio_interval": [0.4, 0.6]}
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    assert f"{resnet['title']}, cold: pair, foreach takes 0.50 of" in tables["pair_wins"]()


@pytest.mark.usefixtures("small_buffers")
def test_training_benchmark_compares_whole_trainings(tmp_path):
    results = run_quickly("training", tmp_path, picture=False)
    (model,) = results["models"]
    names = [entry["name"] for entry in model["candidates"]]
    assert names == ["pair", "FusedSGDR", "pair, whole", "FusedSGDR, whole"]
    for entry in model["candidates"]:
        assert_is_a_timing(entry["hot"])
        assert entry["iterations_per_second"] > 0
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    tables["training"].__globals__["RESULTS"] = tmp_path
    assert tables["training"]().count("FusedSGDR") == 2


@pytest.mark.usefixtures("small_buffers")
def test_scaling_benchmark_has_the_memory_floor_at_every_size(tmp_path):
    results = run_quickly("scaling", tmp_path)
    assert [[point["size"] for point in one["points"]] for one in results["series"]] == [
        [1, 10, 100],
        [64, 4096, 32768],
    ]
    for series in results["series"]:
        for point in series["points"]:
            names = [entry["name"] for entry in point["candidates"]]
            assert names[-2:] == ["memory floor", "FusedSGDR, 1 thread"]
            for entry in point["candidates"]:
                assert_is_a_timing(entry["cold"])
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    tables["small_tensors"].__globals__["RESULTS"] = tmp_path
    assert "10 to 100" in tables["small_tensors"]()


@pytest.mark.exhaustive
def test_backward_memory_benchmark_measures_both_ways(tmp_path):
    step, in_backward = run_quickly("backward_memory", tmp_path)["ways"]
    assert step["grad_bytes"] == in_backward["grad_bytes"] == 4 * 24 * 256 * 256
    # The momentum and the gradients; the momentum and a gradient or two.
    assert step["rise_bytes"] > 1.8 * step["grad_bytes"]
    assert step["rise_bytes"] - in_backward["rise_bytes"] > 0.7 * step["grad_bytes"]


@pytest.mark.usefixtures("_only_ours_and_the_pair", "small_buffers")
def test_gpu_benchmark_saves_each_case_before_the_next(monkeypatch, tmp_path, benchmark):
    gpu, steps = benchmark("gpu"), benchmark("steps")
    run_case = steps.run_case

    def only_the_first(case, *args):
        if not case.title.startswith("MLP"):
            raise TimeoutError
        return run_case(case, *args)

    monkeypatch.setattr(steps, "run_case", only_the_first)
    with pytest.raises(TimeoutError):
        gpu.main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    (case,) = results["cases"]
    for entry in case["candidates"]:
        assert_is_a_timing(entry["cold"])


def test_gpu_benchmark_draws_older_results(tmp_path, benchmark):
    pytest.importorskip("matplotlib")
    measured = ROOT / "benchmarks/results/gpu_h100.json"
    copied = tmp_path / "measured.json"
    copied.write_text(measured.read_text())
    gpu = benchmark("gpu")
    gpu.main(["--draw", str(copied)])
    assert copied.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert copied.read_text() == measured.read_text()

    results = json.loads(measured.read_text())
    figure = gpu.picture(results)
    assert results["gpu"]["name"] in figure.get_suptitle()
    for ax, case in zip(figure.axes, results["cases"], strict=True):
        steps = [entry["step"]["median_us"] for entry in case["candidates"]]
        assert [bar.get_width() for bar in ax.patches[: len(steps)]] == steps


def test_device_events_are_what_ran(benchmark):
    """On a GPU the events are its kernels. A warning is an error, here and there."""
    events = benchmark("gpu").device_events(lambda: torch.ones(3).add_(1), "cpu")
    assert [event.name for event in events].count("aten::add_") == 1


def test_device_work_counts_launches_and_all_time(benchmark):
    gpu = benchmark("gpu")
    events = [("fused_step_kernel", 3.0), ("Memcpy DtoH", 1.0), ("Memset", 0.5)] * 2
    work = gpu.DeviceWork.of([gpu.KernelEvent(*event) for event in events], steps=2)
    assert work == gpu.DeviceWork(launches=1, microseconds=4.5)


# -------------------------------------------------------------------------------------- the timing


def test_cold_call_writes_more_than_the_last_level_cache_outside_the_clock(monkeypatch, benchmark):
    harness = benchmark("harness")
    monkeypatch.setattr(harness, "last_level_cache_bytes", lambda: 80 << 20)
    clock = harness.Clock()
    assert clock.evicted_bytes == {"cpu": 160 << 20}
    order = []
    (buffer,) = clock._buffers
    assert buffer.numel() == 160 << 20
    clock._buffers = [type("Buffer", (), {"add_": lambda *_: order.append("write")})()]
    counter = time.perf_counter
    monkeypatch.setattr(harness.time, "perf_counter", lambda: (order.append("clock"), counter())[1])
    clock.cold(lambda: order.append("step"))
    # An empty call between them warms the clock itself.
    assert order[:4] == ["write", "clock", "clock", "clock"]
    assert order[4:] == ["step", "clock"]
    order.clear()
    clock.hot(lambda: order.append("step"), 2)
    assert order[:4] == ["step", "clock", "step", "step"]


def test_every_round_times_every_candidate(benchmark, tmp_path):
    harness = benchmark("harness")
    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def hot(self, calls):
            order.append(self.name)
            return harness.Seconds(1.0, 1.0)

        def cold(self):
            order.append(self.name)
            return harness.Seconds(2.0, 2.0)

    settings = harness.Settings(rounds=4, out=tmp_path)
    measured = harness.measure([Recorder("a"), Recorder("b")], settings)
    turns = [set(order[i : i + 2]) for i in range(2, len(order), 2)]  # after the calls are counted
    assert turns == [{"a", "b"}] * (4 * (1 + harness.COLD_CALLS_PER_ROUND))
    assert measured["a"].cold.median == 2.0
    assert measured["a"].hot.median == 1.0


def test_ratio_is_the_median_over_rounds(benchmark):
    Timing = benchmark("harness").Timing
    slow, fast = Timing(1, [2.0, 20.0, 3.0]), Timing(1, [1.0, 10.0, 1.0])
    assert slow.as_json(fast)["ratio"] == 2
    assert slow.as_json(fast)["ratio_interval"] == [2, 3]


def test_interval_holds_the_median_of_most_samples(benchmark):
    """A 95 % interval that holds the true median of 95 in 100 samples, or nearly."""
    harness = benchmark("harness")
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(100):
        low, high = harness.median_interval(torch.randn(40, generator=generator).tolist())
        held += low <= 0 <= high
    assert 88 <= held <= 99


# --------------------------------------------------------------------------------------- the check


def ignores_momentum(groups):
    """Makes a momentum buffer and ignores it."""
    workload = importlib.import_module("benchmarks.workload")
    optimizer = FusedSGDR(groups, **workload.OPTIONS | workload.SCHEDULE)

    def step():
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param].pop("momentum_buffer", None)
        optimizer.step()

    return optimizer, step


MISSING = ["momentum", "Nesterov", "weight decay", "the schedule", "the restart"]


@pytest.mark.parametrize("missing", [*MISSING, "the use of the buffer"])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": torch.bfloat16}], ids=str)
def test_candidate_with_a_wrong_update_is_not_timed(missing, options, benchmark):
    module = benchmark("workload")
    assert list(module.WITHOUT) == MISSING

    def build(groups):
        return module.fused_sgdr(groups, **options | module.WITHOUT[missing])

    workload = module.Workload([(5,), (3, 2)])
    build = ignores_momentum if missing not in MISSING else build
    with pytest.raises(AssertionError, match="another does not make the reference's update"):
        workload.checked_step("another", build, **options)
    workload.checked_step("it", lambda groups: module.fused_sgdr(groups, **options), **options)


def test_whole_step_that_does_less_is_not_timed(benchmark):
    module, contestants = benchmark("workload"), benchmark("contestants")
    workload = module.Workload([(5,), (3, 2)])
    options = {"max_grad_norm": contestants.max_grad_norm(workload), "ema_decay": 0.9}
    for less in ({"max_grad_norm": None}, {"ema_decay": None}, *module.WITHOUT.values()):
        with pytest.raises(AssertionError, match="less does not make the reference's update"):
            workload.checked_step(
                "less",
                lambda groups, less=less: module.fused_sgdr(groups, **options | less),
                momentum_eps=contestants.NORM_EPS,
                **options,
            )


def test_tolerance_that_would_hide_a_missing_option_is_refused(benchmark):
    module = benchmark("workload")
    workload = module.Workload([(5,), (3, 2)])
    with pytest.raises(AssertionError, match=r"loose: a tolerance of .* hide that weight decay"):
        workload.checked_step("loose", module.fused_sgdr, momentum_eps=1e-4)
    with pytest.raises(AssertionError, match="momentum is missing"):
        workload.checked_step("looser", module.fused_sgdr, momentum_eps=1.0)
    with pytest.raises(TypeError, match="positional"):
        workload.checked_step("loosest", module.fused_sgdr, 1.0)


def test_gpu_benchmark_times_no_candidate_that_ignores_momentum(monkeypatch, tmp_path, benchmark):
    """A kernel once ignored the momentum on a GPU, and the benchmark did not notice."""
    contestants, steps = benchmark("contestants"), benchmark("steps")
    monkeypatch.setattr(contestants, "native", lambda: ignores_momentum)
    settings = benchmark("harness").Settings(2, tmp_path, quick=True)
    with pytest.raises(AssertionError, match="FusedSGDR does not make the reference's update"):
        steps.run_case(steps.cases(settings, "cpu")[0], settings, "cpu")


@pytest.mark.usefixtures("small_buffers")
def test_library_that_makes_another_update_is_left_out_by_name(benchmark):
    contestants, workload = benchmark("contestants"), benchmark("workload")
    lineup = contestants.Lineup(workload.Workload([(5,)]), benchmark("harness").Clock())

    def does_not_run(groups):
        raise RuntimeError("needs a GPU\nand more")

    for name, build in (
        ("wrong", ignores_momentum),
        ("broken", does_not_run),
        ("right", workload.fused_sgdr),
    ):
        lineup.add_library(name, "math", lambda library, build=build: build)
    lineup.add_library("missing", "no_such_library.optim", lambda library: None)
    assert [candidate.name for candidate in lineup.candidates] == ["right + scheduler"]
    assert lineup.left_out == {
        "wrong + scheduler": "makes another update",
        "broken + scheduler": "does not run here: needs a GPU",
        "missing + scheduler": "not installed",
    }


def test_training_with_a_wrong_update_is_not_timed(benchmark):
    training = benchmark("training")
    model = "MLP, batch 128"
    for whole in (False, True):
        expected = training.losses(training.Training(model, training.Way("pair", whole), "cpu"))
        ours = training.Way("FusedSGDR", whole)
        training.checked(model, ours, "cpu", expected)
        with pytest.raises(AssertionError, match=r"trains MLP, batch 128 to losses .*% off"):
            training.checked(model, ours, "cpu", expected, nesterov=False)


@pytest.mark.parametrize("without", [{}, {"nesterov": False}, {"weight_decay": 0.0}], ids=str)
def test_optax_step_is_checked_as_the_others(without, benchmark):
    pytest.importorskip("optax")
    optax, module = benchmark("optax_process"), benchmark("workload")
    workload = module.Workload([(5,), (3, 2)])
    step = optax.OptaxStep(workload.params, **without)
    for _ in range(module.CHECKED_STEPS):
        step()
    result = [torch.tensor(array.tolist()) for array in step.params]
    if without:
        with pytest.raises(AssertionError, match="does not make the reference's update"):
            workload.check("optax", result)
    else:
        workload.check("optax", result)


@pytest.mark.exhaustive
def test_optax_takes_its_turn_from_a_process_of_its_own(benchmark):
    pytest.importorskip("optax")
    with benchmark("optax_process").start("optax", "cpu", 1, [(5,), (3, 2)]) as process:
        for seconds in (process.hot(3), process.cold()):
            assert 0 < seconds.returned <= seconds.done < 60
    assert process.process.returncode == 0


def test_memory_floor_reads_and_writes_every_element(benchmark):
    workload = benchmark("workload").Workload([(3,), (1 << 13,), (100, 333)])
    clock = benchmark("harness").Clock()
    momentum = [torch.zeros_like(param) for param in workload.params]  # the candidates share it
    for candidate in benchmark("memory_floor").floor_candidates(workload, clock):
        momentum = [m + param.grad for m, param in zip(momentum, workload.params, strict=True)]
        expected = [param + m for m, param in zip(momentum, workload.params, strict=True)]
        candidate.step()
        for param, value in zip(workload.params, expected, strict=True):
            assert torch.equal(param, value)
