import subprocess
import sys

import pytest

from sgdr_fused import CosineWarmRestarts, plot_schedule

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    """Axes that belong to no window."""
    return figure.Figure().subplots()


def test_curve_follows_the_schedule(ax):
    schedule = CosineWarmRestarts(lr=0.1, T_0=10, T_mult=2)
    assert plot_schedule(schedule, 70, ax) is ax
    steps, lrs = ax.lines[0].get_data()
    assert list(steps) == list(range(70))
    assert list(lrs) == [schedule.lr_at(step) for step in range(70)]


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
    for turn in (777, *schedule.restarts(1_000_000)):
        assert lrs[steps.index(turn)] == 0.1
        assert turn - 1 in steps
    assert steps[-1] == 999_999


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


def test_importing_the_package_does_not_import_matplotlib():
    check = "import sys, sgdr_fused; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
