"""sgdr-fused, or python -m sgdr_fused: inspect a schedule before training."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

import sgdr_fused
from sgdr_fused import CosineWarmRestarts
from sgdr_fused.cli.main import main
from sgdr_fused.cli.phases import Phases
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


LONG = ["schedule", "--T-0", "10", "--cycle-decay", "0.9", "--epochs", str(10**15)]


def test_schedule_of_any_length_is_printed_at_once(run):
    """100 million epochs printed nothing for a minute, and 100,000 cycles a solid block."""
    printed = run(*LONG)
    rows = rows_of(printed)
    assert rows[0] == ["0", "0", "10", "0.1", "0.00244717"]
    assert rows[-1][:3] == [str(10**14 - 1), str(10**15 - 10), "10"]
    assert len(rows) == 24
    assert f"... {10**14 - 23} more ..." in printed
    assert f"The first 18 of {10**14} cycles:\n0.1 |" in printed
    assert printed.endswith("180 epochs\n")
    assert printed.splitlines()[-2].count("|") == 17


def test_epochs_are_printed_in_full(run):
    assert run("schedule", "--T-0", 10, "--T-mult", 2, "--epochs", 10**6).endswith(
        "1000000 epochs\n"
    )


def test_fit_of_any_length_is_printed_at_once(run):
    printed = run("fit", "--epochs", 10**15, "--cycles", 10**9)
    assert printed.startswith("T_0=1000000: 1000000000 cycles in")


@pytest.mark.parametrize("argv", [LONG, ["fit", "--epochs", str(10**15), "--cycles", str(10**9)]])
def test_more_steps_than_json_can_list_are_an_error_at_once(argv, capsys):
    with pytest.raises(SystemExit):
        main([*argv, "--json"])
    assert f"but {10**15} are more than 1000000; in Python" in capsys.readouterr().err


def test_long_schedule_is_plotted_by_its_beginning(run, tmp_path):
    pytest.importorskip("matplotlib")
    run(*LONG, "--plot", tmp_path / "schedule.svg")
    assert f"the first 50 of {10**14} cycles" in (tmp_path / "schedule.svg").read_text()


def test_options_may_be_spelt_as_in_python(run):
    assert run(*(arg.replace("--T-", "--T_") for arg in SCHEDULE)) == run(*SCHEDULE)
    assert run("schedule", "--T_0=10", "--epochs=9", "--warmup_start_lr=1e-2", "--warmup_steps=2")


def test_version_is_told(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"sgdr_fused {sgdr_fused.__version__}\n"


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
    names = [(p.name, p.start, p.steps) for p in Phases(schedule, 20)]
    assert names == [("warm-up", 0, 3), ("0", 3, 4), ("1", 7, 8), ("end", 15, 5)]
    assert [p.name for p in Phases(schedule, 2)] == ["warm-up"]
    assert [(p.name, p.steps) for p in Phases(schedule, 15)][-1] == ("1", 8)
    for total in range(1, 25):
        phases = Phases(schedule, total)
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
        (["schedule", "--T-0", "x", "--epochs", "9"], "argument --T-0: 'x' is not an integer"),
        (
            ["schedule", "--T-0", "3", "--epochs", "1e3"],
            "argument --epochs: '1e3' is not an integer",
        ),
        (["schedule", "--T-0", "3", "--T-mult", "x"], "argument --T-mult: 'x' is not a number"),
        (["schedule", "--T-0", "3", "--lr", "x"], "argument --lr: 'x' is not a number"),
        (["schedule", "--T0", "3", "--epochs", "9"], "no option --T0; did you mean --T-0?"),
        (
            ["fit", "--epochs=9", "--cycle=2", "--tmult=2"],
            "no option --tmult; did you mean --T-mult?",
        ),
        (["fit", "--zzzz"], "no option --zzzz; see sgdr-fused fit --help"),
        (
            ["schedule", "--T-0", "3", "--epochs", str(2**53), "--steps-per-epoch", "9"],
            "Invalid epochs * steps_per_epoch value",
        ),
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
    assert "--plot needs matplotlib; run: pip install matplotlib" in capsys.readouterr().err


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


@pytest.mark.parametrize(("name", "value"), [("--epochs", "-5"), ("--cycles", "0")])
def test_error_of_fit_names_the_option(capsys, name, value):
    with pytest.raises(SystemExit):
        main(["fit", *("--epochs", "9"), *("--cycles", "3"), name, value])
    assert f"Invalid {name} value: {value}; {name} must be an integer" in capsys.readouterr().err
