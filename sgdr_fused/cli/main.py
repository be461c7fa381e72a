"""The command line: shows a schedule before a training; ``python -m sgdr_fused --help``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn

from sgdr_fused.cli.phases import phases_of
from sgdr_fused.cli.plot import plot_schedule
from sgdr_fused.cli.text_plot import bold, curve, cyan, plain, table
from sgdr_fused.schedule import CosineWarmRestarts, fit_T_0
from sgdr_fused.values import LENGTH


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Its arguments; None: those of the process.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe; Python would raise again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def _show_schedule(args: argparse.Namespace) -> None:
    names = CosineWarmRestarts.__dataclass_fields__
    schedule = CosineWarmRestarts(**{name: getattr(args, name) for name in names})
    _report(schedule, args, {}, [])


def _show_fit(args: argparse.Namespace) -> None:
    T_0 = fit_T_0(args.epochs, args.cycles, args.T_mult)
    schedule = CosineWarmRestarts(lr=args.lr, T_0=T_0, T_mult=args.T_mult, n_cycles=args.cycles)
    used = schedule.cycle_start(args.cycles)
    starts = [0, *schedule.restarts(used)]  # an error if there are too many to list
    lengths = [schedule.cycle_length(cycle) for cycle in range(len(starts))]
    cycles = "1 cycle" if args.cycles == 1 else f"{args.cycles} cycles"
    answer = f"T_0={T_0}: {cycles} in {used} of {args.epochs} epochs"
    if used < args.epochs:
        needed = replace(schedule, T_0=T_0 + 1).cycle_start(args.cycles)
        answer += f"; {args.epochs - used} left over, T_0={T_0 + 1} would need {needed}"
    fitted = {"T_0": T_0, "cycle_lengths": lengths, "epochs_used": used}
    args.epochs = used
    _report(schedule, args, fitted, [answer])


def _report(
    schedule: CosineWarmRestarts, args: argparse.Namespace, more: dict[str, Any], head: list[str]
) -> None:
    LENGTH.plain("epochs", args.epochs)
    total_steps = args.epochs * schedule.steps_per_epoch
    if args.plot:
        _save_picture(schedule, total_steps, args.plot)
    phases = phases_of(schedule, total_steps)
    if args.json:
        report = {
            **more,
            "options": asdict(schedule),
            "total_steps": total_steps,
            "restarts": schedule.restarts(total_steps),
            "phases": [phase._asdict() for phase in phases],
            "lr": [schedule.lr_at(step) for step in range(total_steps)],
        }
        print(json.dumps(report))
        return

    is_coloured = _is_coloured()
    heading, drawing = (bold, cyan) if is_coloured else (plain, plain)
    lines = [*map(heading, head), *([""] if head else [])]
    lines += table(phases, schedule.steps_per_epoch, heading)
    if phases[-1].is_cut_short:
        lines += [
            "",
            "The training ends within a cycle; the best weights are those at a cycle's end.",
        ]
    lines += ["", *curve(schedule, total_steps, shutil.get_terminal_size().columns, style=drawing)]
    print("\n".join(lines))


def _save_picture(schedule: CosineWarmRestarts, total_steps: int, path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError('--plot needs matplotlib; run: pip install "sgdr_fused[plot]"') from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = plot_schedule(schedule, total_steps, figure.subplots())
    ax.set_xlabel("epoch")
    figure.savefig(path, dpi=150)


def _is_coloured() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sgdr_fused",
        description="Cosine annealing with warm restarts: look at a schedule before training.",
    )
    commands = parser.add_subparsers(required=True, metavar="schedule | fit")

    schedule = commands.add_parser(
        "schedule",
        help="the cycles and the LR of a training",
        description="The cycles and the LR of a training, as a table and a curve.",
    )
    schedule.set_defaults(command=_show_schedule)
    schedule.add_argument("--epochs", type=int, required=True, help="length of the training")
    schedule.add_argument("--T-0", type=int, required=True, help="epochs of the first cycle")
    schedule.add_argument("--T-mult", type=_real, default=1, help="each cycle is longer by")
    schedule.add_argument("--lr", type=float, default=0.1, help="the first peak (%(default)s)")
    schedule.add_argument("--eta-min", type=float, default=0.0, help="the floor (%(default)s)")
    schedule.add_argument("--steps-per-epoch", type=int, default=1, help="(%(default)s)")
    schedule.add_argument("--anneal", default="step", help="step or epoch (%(default)s)")
    schedule.add_argument("--warmup-steps", type=int, default=0, help="(%(default)s)")
    schedule.add_argument("--warmup-start-lr", type=float, default=0.0, help="(%(default)s)")
    schedule.add_argument("--cycle-decay", type=float, default=1.0, help="each peak is lower by")
    schedule.add_argument("--n-cycles", type=int, help="cycles before the LR stays at the floor")

    fit = commands.add_parser(
        "fit",
        help="the T_0 for which a number of cycles fits a budget",
        description="The longest first cycle for which a number of cycles fits a budget.",
    )
    fit.set_defaults(command=_show_fit)
    fit.add_argument("--epochs", type=int, required=True, help="the budget, without warm-up")
    fit.add_argument("--cycles", type=int, required=True, help="number of cycles")
    fit.add_argument("--T-mult", type=_real, default=1, help="each cycle is longer by")
    fit.add_argument("--lr", type=float, default=0.1, help="the peak (%(default)s)")

    for command in (schedule, fit):
        command.add_argument("--plot", metavar="FILE", help="draw the LR: a .png, .svg or .pdf")
        command.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _real(text: str) -> float:
    """An int if the text is one, because integers are exact; else a float."""
    try:
        return int(text)
    except ValueError:
        return float(text)
