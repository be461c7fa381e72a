"""python -m sgdr_fused: inspect a schedule before training."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from sgdr_fused import CosineWarmRestarts
from sgdr_fused.cli.main import main
from sgdr_fused.cli.phases import phases_of
from sgdr_fused.cli.text_plot import curve

SCHEDULE = ["schedule", "--T-0", "10", "--T-mult", "2", "--epochs", "100"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line and returns its output."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv):
        main([str(arg) for arg in argv])
        return capsys.readouterr().out

    return run


def rows_of(printed):
    """The table's cells, without its heading."""
    return [line.split() for line in printed.split("\n\n")[0].splitlines()[1:]]


def test_schedule_prints_every_cycle_and_its_restart(run):
    rows = rows_of(run(*SCHEDULE))
    assert [row[:3] for row in rows] == [
        ["0", "0", "10"],
        ["1", "10", "20"],
        ["2", "30", "40"],
        ["3", "70", "30"],
    ]
    assert rows[3][3:5] == ["of", "80"]
    schedule = CosineWarmRestarts(lr=0.1, T_0=10, T_mult=2)
    assert float(rows[1][4]) == pytest.approx(schedule.lr_at(29), rel=1e-5)


def test_more_cycles_than_can_be_listed_are_an_error_at_once(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--epochs", str(10**15), "--cycles", str(10**9)])
    assert "has 999999999 restarts" in capsys.readouterr().err


def test_schedule_says_that_the_training_ends_within_a_cycle(run):
    assert "within a cycle" in run(*SCHEDULE)
    assert "within a cycle" not in run("schedule", "--T-0", 10, "--T-mult", 2, "--epochs", 70)


def test_every_option_of_the_schedule_has_an_effect(run):
    options = {
        "lr": 0.5,
        "T_0": 3,
        "T_mult": 1.5,
        "eta_min": 0.01,
        "steps_per_epoch": 7,
        "anneal": "epoch",
        "warmup_steps": 5,
        "warmup_start_lr": 0.02,
        "cycle_decay": 0.5,
        "n_cycles": 3,
    }
    schedule = CosineWarmRestarts(**options)
    flags = [part for k, v in options.items() for part in ("--" + k.replace("_", "-"), v)]
    printed = json.loads(run("schedule", "--epochs", 20, *flags, "--json"))
    assert printed["options"] == options
    assert printed["total_steps"] == 140
    assert printed["lr"] == [schedule.lr_at(step) for step in range(140)]
    assert printed["restarts"] == schedule.restarts(140)


def test_phases_cover_the_schedule_from_first_to_last_step():
    schedule = CosineWarmRestarts(lr=1.0, T_0=4, T_mult=2, warmup_steps=3, n_cycles=2)
    names = [(p.name, p.start, p.steps) for p in phases_of(schedule, 20)]
    assert names == [("warm-up", 0, 3), ("0", 3, 4), ("1", 7, 8), ("end", 15, 5)]
    assert [p.name for p in phases_of(schedule, 2)] == ["warm-up"]
    assert [(p.name, p.steps) for p in phases_of(schedule, 15)][-1] == ("1", 8)
    for total in range(1, 25):
        phases = phases_of(schedule, total)
        assert sum(phase.steps for phase in phases) == total
        assert [p.is_cut_short for p in phases[:-1]] == [False] * (len(phases) - 1)
        assert phases[-1].last_lr == schedule.lr_at(total - 1)


def test_many_cycles_are_shortened(run):
    lines = run("schedule", "--T-0", 1, "--epochs", 1000).splitlines()
    assert len(lines) < 50
    assert any("more" in line for line in lines)


def test_curve_peaks_where_the_schedule_restarts():
    schedule = CosineWarmRestarts(lr=1.0, T_0=10, T_mult=2)
    lines = curve(schedule, total_steps=70, width=75, height=8)
    margin = lines[0].index("|") + 1
    top, axis = lines[0][margin:], lines[-2][margin:]
    for restart in (10, 30):
        assert axis[restart] == "|"
        assert top[restart] == "*"
        assert top[restart - 1] == " "
    assert axis.count("|") == 2
    assert max(map(len, lines)) <= 75


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.1, "eta_min": 0.1}])
@pytest.mark.parametrize("total_steps", [1, 2, 1000])
def test_curve_of_a_constant_is_a_line(options, total_steps):
    lines = curve(CosineWarmRestarts(T_0=5, **options), total_steps)
    assert len({i for i, line in enumerate(lines) if "*" in line}) == 1


def test_fit_finds_T_0_for_90_epochs_in_three_doubling_cycles(run):
    printed = run("fit", "--epochs", 90, "--cycles", 3, "--T-mult", 2)
    first = printed.splitlines()[0]
    assert first.startswith("T_0=12: 3 cycles in 84 of 90 epochs")
    assert "T_0=13 would need 91" in first
    as_json = json.loads(run("fit", "--epochs", 90, "--cycles", 3, "--T-mult", 2, "--json"))
    assert as_json["T_0"] == 12
    assert as_json["cycle_lengths"] == [12, 24, 48]
    assert as_json["restarts"] == [12, 36]


def test_fit_without_a_rest_mentions_none(run):
    printed = run("fit", "--epochs", 90, "--cycles", 3)
    assert printed.splitlines()[0] == "T_0=30: 3 cycles in 90 of 90 epochs"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["schedule", "--T-0", "0", "--epochs", "9"], "Invalid T_0 value: 0; T_0 must be"),
        (["schedule", "--T-0", "x", "--epochs", "9"], "'x'"),
        (["schedule", "--T-0", "3", "--epochs", "0"], "Invalid epochs value: 0; epochs must be"),
        (["schedule", "--T-0", "3", "--epochs", "9" * 400], "Invalid epochs value: 999"),
        (["schedule", "--T-0", "3"], "--epochs"),
        (["schedule", "--T-0", "3", "--epochs", "9", "--eta-min", "1"], "eta_min=1.0"),
        (
            ["schedule", "--T-0", "3", "--epochs", "9", "--T-mult", "nan"],
            "Invalid T_mult value: nan",
        ),
        (["schedule", "--T-0", "3", "--epochs", "9", "--anneal", "never"], "never"),
        (["fit", "--epochs", "2", "--cycles", "3"], "total_steps=2"),
        (["plan"], "plan"),
        ([], "schedule | fit"),
    ],
)
def test_bad_input_is_an_error_of_one_line_with_exit_code_2(argv, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert says in printed.err


def test_plot_draws_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedule.png"
    run(*SCHEDULE, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unwritable_picture_is_an_error_of_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for path in (tmp_path / "nowhere" / "x.png", tmp_path / "x.docx"):
        with pytest.raises(SystemExit) as exit_:
            main([*SCHEDULE, "--plot", str(path)])
        assert exit_.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit_:
        main([*SCHEDULE, "--plot", "x.png"])
    assert exit_.value.code == 2
    assert 'pip install "sgdr_fused[plot]"' in capsys.readouterr().err


def in_a_terminal(**environment):
    """What the command prints to a terminal."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sgdr_fused", *SCHEDULE]
    process = subprocess.Popen(
        command, stdout=theirs, env=kept | {"TERM": "xterm", "COLUMNS": "80"} | environment
    )
    os.close(theirs)
    printed = b""
    try:
        while more := os.read(ours, 4096):
            printed += more
    except OSError:  # on Linux: the other side was closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return printed.decode().replace("\r\n", "\n")


def test_colours_only_for_terminals_that_want_them(run):
    piped = run(*SCHEDULE)
    coloured = in_a_terminal()
    assert "\x1b[" not in piped
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == piped
    assert in_a_terminal(NO_COLOR="1") == piped
    assert in_a_terminal(TERM="dumb") == piped


def test_closed_pipe_prints_no_traceback():
    command = [
        sys.executable,
        "-m",
        "sgdr_fused",
        "schedule",
        "--T-0=1",
        "--epochs=20000",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0
