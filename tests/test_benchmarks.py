import importlib
import json
import math
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


def run_quickly(name, out):
    """Runs a benchmark on tiny shapes and returns its JSON."""
    pytest.importorskip("matplotlib")
    importlib.import_module(f"benchmarks.{name}").main(
        ["--quick", "--rounds", "2", "--out", str(out)]
    )
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / f"{name}.json").read_text())
    environment = results["environment"]
    assert {"cpu", "cpu_capability", "cores", "threads", "torch", "sgdr_fused", "date"} <= set(
        environment
    )
    assert environment["rounds"] == 2
    return results


def assert_is_a_timing(entry):
    first, third = entry["quartiles_us"]
    assert 0 < first <= entry["median_us"] <= third < math.inf
    assert entry["calls_per_round"] >= 1


def test_resnet50_has_161_parameters_of_25557032_elements():
    shapes = importlib.import_module("benchmarks.shapes")
    resnet50 = shapes.resnet50()
    assert (len(resnet50), shapes.numel(resnet50)) == (161, 25_557_032)
    assert resnet50[0] == (64, 3, 7, 7)
    assert resnet50[-2:] == [(1000, 2048), (1000,)]


def test_mlp_has_6_parameters_of_ten_thousand_elements():
    shapes = importlib.import_module("benchmarks.shapes")
    assert (len(shapes.mlp()), shapes.numel(shapes.mlp())) == (6, 9674)


@pytest.mark.exhaustive
def test_step_benchmark_compares_the_pair_in_all_forms(tmp_path):
    results = run_quickly("step", tmp_path)
    assert [case["tensors"] for case in results["cases"]] == [6, 20, 20, 161]
    for case in results["cases"]:
        names = [candidate["name"] for candidate in case["candidates"]]
        assert names[:5] == [
            "SGD(foreach=False) + scheduler",
            "SGD(foreach=True) + scheduler",
            "SGD(fused=True) + scheduler",
            "FusedSGDR, reference",
            "FusedSGDR",
        ]
        assert case["candidates"][4]["ratio"] == 1
        assert case["best_pair"] in names[:3]
        for candidate in [*case["candidates"], *case["memory_floors"]]:
            assert_is_a_timing(candidate)
    assert results["cases"][-1]["memory_floors"]


@pytest.mark.exhaustive
def test_one_pass_benchmark_compares_the_whole_step_and_each_option(tmp_path):
    results = run_quickly("one_pass", tmp_path)
    assert [len(case["candidates"]) for case in results["cases"]] == [3, 3, 3, 3, 4, 3, 3]
    for case in results["cases"]:
        for candidate in case["candidates"]:
            assert_is_a_timing(candidate)
        assert case["best_pair"] in [candidate["name"] for candidate in case["candidates"]]


@pytest.mark.exhaustive
def test_backward_memory_benchmark_measures_both_ways(tmp_path):
    step, in_backward = run_quickly("backward_memory", tmp_path)["ways"]
    assert step["grad_bytes"] == in_backward["grad_bytes"] == 4 * 24 * 256 * 256
    # The momentum and the gradients; the momentum and a gradient or two.
    assert step["rise_bytes"] > 1.8 * step["grad_bytes"]
    assert step["rise_bytes"] - in_backward["rise_bytes"] > 0.7 * step["grad_bytes"]


def test_small_tensors_benchmark_fits_a_line_for_each_number_of_threads(tmp_path):
    results = run_quickly("small_tensors", tmp_path)
    assert {series["threads"] for series in results["series"]} == {1, torch.get_num_threads()}
    for series in results["series"]:
        assert math.isfinite(series["slope_ns"])
        assert [entry["tensors"] for entry in series["lists"]] == [10, 30, 100]
        for entry in series["lists"]:
            assert_is_a_timing(entry)


def test_threads_benchmark_times_every_size_on_one_and_two_threads(tmp_path):
    results = run_quickly("threads", tmp_path)
    assert results["kParallelNumel"] > 0
    assert len(results["sizes"]) == 6
    for size in results["sizes"]:
        assert [timing["threads"] for timing in size["timings"]] == [1, 2]
        for timing in size["timings"]:
            assert_is_a_timing(timing)


def test_gpu_benchmark_measures_every_candidate(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the benchmark itself is for a GPU; this is its logic on the CPU")
    results = run_quickly("gpu", tmp_path)
    assert results["gpu"] is None
    for case in results["cases"]:
        assert case["copy_bytes_per_second"] > 0
        assert [entry["name"] for entry in case["candidates"]] == [
            "FusedSGDR",
            "SGD(fused=True) + scheduler",
            "SGD(fused=True), tensor LR + scheduler",
            "SGD(foreach=True) + scheduler",
        ]
        assert case["candidates"][0]["ratio"] == 1
        for entry in case["candidates"]:
            assert_is_a_timing(entry["host"])
            assert_is_a_timing(entry["step"])
            assert entry["host"]["median_us"] <= entry["step"]["median_us"]


def test_gpu_benchmark_draws_a_saved_result(tmp_path):
    pytest.importorskip("matplotlib")
    measured = ROOT / "benchmarks/results/gpu_h100.json"
    copied = tmp_path / "measured.json"
    copied.write_text(measured.read_text())
    gpu = importlib.import_module("benchmarks.gpu")
    gpu.main(["--draw", str(copied)])
    assert copied.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert copied.read_text() == measured.read_text()

    results = json.loads(measured.read_text())
    figure = gpu.picture(results)
    assert results["gpu"]["name"] in figure.get_suptitle()
    for ax, case in zip(figure.axes, results["cases"], strict=True):
        steps = [entry["step"]["median_us"] for entry in case["candidates"]]
        assert [bar.get_width() for bar in ax.patches[: len(steps)]] == steps


def test_gpu_benchmark_saves_each_case_before_the_next(monkeypatch, tmp_path):
    gpu = importlib.import_module("benchmarks.gpu")

    def run_case(title, *_):
        if title != "MLP":
            raise TimeoutError
        return {"title": title}

    monkeypatch.setattr(gpu, "run_case", run_case)
    with pytest.raises(TimeoutError):
        gpu.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [case["title"] for case in results["cases"]] == ["MLP"]


def test_gpu_benchmark_compiles_only_short_tensor_lists(monkeypatch):
    gpu = importlib.import_module("benchmarks.gpu")
    compiled = "compiled SGD, tensor LR + scheduler"
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    assert compiled in gpu.builds("cuda", 161)
    assert compiled not in gpu.builds("cuda", 2000)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert compiled not in gpu.builds("cuda", 161)


def test_device_events_are_what_ran():
    """On a GPU the events are its kernels. A warning is an error, here and there."""
    gpu = importlib.import_module("benchmarks.gpu")
    events = gpu.device_events(lambda: torch.ones(3).add_(1), "cpu")
    assert [event.name for event in events].count("aten::add_") == 1


def test_device_work_counts_launches_and_all_time():
    gpu = importlib.import_module("benchmarks.gpu")
    events = [("fused_step_kernel", 3.0), ("Memcpy DtoH", 1.0), ("Memset", 0.5)] * 2
    work = gpu.DeviceWork.of([gpu.KernelEvent(*event) for event in events], steps=2)
    assert work == gpu.DeviceWork(launches=1, microseconds=4.5)


def test_fit_line_recovers_a_line():
    small_tensors = importlib.import_module("benchmarks.small_tensors")
    counts = [10, 100, 1000]
    line = small_tensors.fit_line(counts, [2e-6 + 70e-9 * count for count in counts])
    assert line == pytest.approx((2e-6, 70e-9), rel=1e-9, abs=0)


def test_ratio_is_the_median_over_rounds():
    Timing = importlib.import_module("benchmarks.harness").Timing
    slow, fast = Timing("slow", 1, [2.0, 20.0, 3.0]), Timing("fast", 1, [1.0, 10.0, 1.0])
    assert slow.ratio_to(fast) == 2


def ignores_momentum(params):
    """Makes a momentum buffer and ignores it."""
    harness = importlib.import_module("benchmarks.harness")
    optimizer = FusedSGDR(params, **harness.OPTIONS | harness.SCHEDULE)

    def step():
        for param in params:
            optimizer.state[param].pop("momentum_buffer", None)
        optimizer.step()

    return optimizer, step


MISSING = ["momentum", "Nesterov", "weight decay", "the schedule", "the restart"]


@pytest.mark.parametrize("missing", [*MISSING, "the use of the buffer"])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": torch.bfloat16}], ids=str)
def test_candidate_with_a_wrong_update_is_not_timed(missing, options):
    harness = importlib.import_module("benchmarks.harness")
    assert list(harness.WITHOUT) == MISSING

    def build(params):
        return harness.fused_sgdr(params, **options | harness.WITHOUT[missing])

    workload = harness.Workload([(5,), (3, 2)])
    build = ignores_momentum if missing not in MISSING else build
    with pytest.raises(AssertionError, match="another does not make the reference's update"):
        workload.candidate("another", 1, build, **options)
    right = workload.candidate("it", 1, lambda p: harness.fused_sgdr(p, **options), **options)
    assert right.name == "it"


@pytest.mark.parametrize("by_backward", [False, True])
def test_one_pass_times_no_candidate_that_does_less(by_backward):
    harness = importlib.import_module("benchmarks.harness")
    one_pass = importlib.import_module("benchmarks.one_pass")
    options = {"max_grad_norm": 1.0, "ema_decay": 0.9}
    workload = harness.Workload([(5,), (3, 2)], by_backward=by_backward, **options)
    for less in ({"max_grad_norm": None}, {"ema_decay": None}, *harness.WITHOUT.values()):
        with pytest.raises(AssertionError, match="less does not make the reference's update"):
            workload.candidate(
                "less",
                1,
                lambda params, less=less: harness.fused_sgdr(params, **options | less),
                momentum_eps=one_pass.NORM_EPS,
            )


def test_candidate_without_a_norm_is_not_timed():
    harness = importlib.import_module("benchmarks.harness")
    workload = harness.Workload([(5,), (3, 2)])
    with pytest.raises(AssertionError, match="it takes no norm"):
        workload.candidate("it", 1, harness.fused_sgdr, max_grad_norm=1e9)


def test_tolerance_that_would_hide_a_missing_option_is_refused():
    harness = importlib.import_module("benchmarks.harness")
    workload = harness.Workload([(5,), (3, 2)])
    with pytest.raises(AssertionError, match=r"loose: a tolerance of .* hide that weight decay"):
        workload.candidate("loose", 1, harness.fused_sgdr, momentum_eps=1e-4)
    with pytest.raises(AssertionError, match="momentum is missing"):
        workload.candidate("looser", 1, harness.fused_sgdr, momentum_eps=1.0)
    with pytest.raises(TypeError, match="positional"):
        workload.candidate("loosest", 1, harness.fused_sgdr, 1.0)


def test_gpu_benchmark_times_no_candidate_that_ignores_momentum(monkeypatch, tmp_path):
    """A kernel once ignored the momentum on a GPU, and the benchmark did not notice."""
    gpu = importlib.import_module("benchmarks.gpu")
    harness = importlib.import_module("benchmarks.harness")
    monkeypatch.setattr(gpu, "builds", lambda *_: {gpu.NATIVE: ignores_momentum})
    settings = harness.Settings(2, 0.001, True, tmp_path, 0.0, {})
    with pytest.raises(AssertionError, match="FusedSGDR does not make the reference's update"):
        gpu.run_case("MLP", importlib.import_module("benchmarks.shapes").mlp(), settings, "cpu")


def test_memory_floor_reads_and_writes_every_element():
    harness = importlib.import_module("benchmarks.harness")
    memory_floor = importlib.import_module("benchmarks.memory_floor")
    workload = harness.Workload([(3,), (1 << 13,), (100, 333)])
    for candidate in memory_floor.floor_candidates(workload, threads=1):
        expected = []
        for param, buffer in zip(workload.params, workload.momentum_buffers, strict=True):
            expected.append((param + (buffer + param.grad), buffer + param.grad))
        candidate.step()
        for i, (param, buffer) in enumerate(expected):
            assert torch.equal(workload.params[i], param)
            assert torch.equal(workload.momentum_buffers[i], buffer)
