import re
import subprocess
import sys

import pytest

from sgdr_fused import CosineWarmRestarts, RangeTest, plot_schedule

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    """Axes that belong to no window."""
    return figure.Figure().subplots()


def test_curve_follows_the_schedule(ax):
    schedule = CosineWarmRestarts(lr=0.1, T_0=10, T_mult=2)
    assert plot_schedule(schedule, 70, ax) is ax
    steps, lrs = map(list, ax.lines[0].get_data())
    assert sorted({*steps}) == list(range(71))
    # The last point of each step that is taken.
    drawn = dict(zip(steps, lrs, strict=True))
    assert [drawn[step] for step in range(70)] == [schedule.lr_at(step) for step in range(70)]


def test_lr_rises_vertically_at_a_restart(ax):
    """The line sloped from the last step of a cycle to the first of the next."""
    plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10, T_mult=2, eta_min=0.02), 71, ax)
    steps, lrs = map(list, ax.lines[0].get_data())
    for restart in (10, 30, 70):
        i = steps.index(restart)
        assert steps[i : i + 2] == [restart, restart]
        assert lrs[i : i + 2] == [0.02, 0.1]
    assert len(steps) == 71 + 3 + 1


def test_lr_of_each_epoch_is_drawn_as_a_stair(ax):
    schedule = CosineWarmRestarts(lr=0.1, T_0=2, steps_per_epoch=10, anneal="epoch")
    plot_schedule(schedule, 40, ax)
    assert ax.lines[0].get_drawstyle() == "steps-post"
    times, lrs = map(list, ax.lines[0].get_data())
    assert set(lrs) == {0.1, 0.05}
    assert lrs[times.index(2)] == 0.05  # up to the restart


def test_more_restarts_than_can_be_told_apart_have_no_lines(ax):
    """A hundred million steps were drawn never, and a million with 100,000 dotted lines."""
    plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10), 10**8, ax)
    assert len(ax.lines) == 1
    _, lrs = ax.lines[0].get_data()
    assert len(lrs) < 20_001
    assert max(lrs) == 0.1
    assert min(lrs) == 0


def test_each_restart_has_a_line(ax):
    plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10, T_mult=2), 70, ax)
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [10, 30]


def test_axis_counts_epochs_with_steps_per_epoch(ax):
    plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10, steps_per_epoch=4), 80, ax)
    assert ax.get_xlabel() == "epoch"
    assert ax.get_xlim() == (0, 20)
    assert ax.lines[1].get_xdata()[0] == 10


def test_long_training_is_drawn_with_fewer_points_and_all_peaks(ax):
    schedule = CosineWarmRestarts(lr=0.1, T_0=333_333, warmup_steps=777)
    plot_schedule(schedule, 1_000_000, ax)
    steps, lrs = map(list, ax.lines[0].get_data())
    assert len(steps) < 10_000
    points = {*zip(steps, lrs, strict=True)}
    for turn in (777, *schedule.restarts(1_000_000)):
        assert (turn, 0.1) in points
        assert turn - 1 in steps
    assert steps[-2:] == [999_999, 1_000_000]


def test_plot_without_axes_draws_into_the_current_ones():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    try:
        assert plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10), 30) is ax
    finally:
        pyplot.close()


@pytest.mark.parametrize("total_steps", [0, -1, 2.5])
def test_total_steps_below_1_is_an_error(total_steps, ax):
    with pytest.raises(ValueError, match="total_steps"):
        plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10), total_steps, ax)


@pytest.mark.parametrize(
    ("call", "caller"),
    [
        (lambda: plot_schedule(CosineWarmRestarts(lr=0.1, T_0=10), 30), "plot_schedule()"),
        (lambda: RangeTest([], [], [], None).plot("x.png"), "RangeTest.plot()"),
    ],
    ids=["plot_schedule", "RangeTest.plot"],
)
def test_missing_matplotlib_is_an_error_that_says_what_to_install(call, caller, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = re.escape(f"{caller} needs matplotlib; run: pip install matplotlib")
    with pytest.raises(ModuleNotFoundError, match=message):
        call()


def test_importing_the_package_does_not_import_matplotlib():
    check = "import sys, sgdr_fused; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
