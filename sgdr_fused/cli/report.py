"""Prints a schedule as text or JSON, and saves its picture."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sgdr_fused.cli.parser import Parser
from sgdr_fused.cli.phases import Phases, beginning_of
from sgdr_fused.cli.plot import plot_schedule
from sgdr_fused.cli.text_plot import bold, curve, cyan, plain, table
from sgdr_fused.pictures import new_figure
from sgdr_fused.schedule import CosineWarmRestarts
from sgdr_fused.values import LENGTH

__all__ = ["add_output_options", "report"]

# Steps.
_LONGEST_JSON = 10**6
_MOST_CYCLES_IN_A_PICTURE = 50


def add_output_options(parser: Parser) -> None:
    """Adds the options that :func:`report` reads.

    Args:
        parser: That of a command.
    """
    parser.add_argument("--plot", metavar="FILE", help="draw the LR: a .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON, with each LR")


def report(
    schedule: CosineWarmRestarts,
    epochs: int,
    args: argparse.Namespace,
    answer: Mapping[str, Any] | None = None,
    head: Sequence[str] = (),
) -> None:
    """Prints the schedule of a training, as the command's options ask.

    Args:
        schedule: The schedule.
        epochs: Length of the training.
        args: The command's options.
        answer: Further entries of the JSON.
        head: Lines to print above the table.

    Raises:
        ValueError: ``epochs`` is out of its range.
    """
    LENGTH.plain("epochs", epochs)
    total_steps: int = LENGTH.plain("epochs * steps_per_epoch", epochs * schedule.steps_per_epoch)
    if args.json and total_steps > _LONGEST_JSON:
        raise ValueError(
            f"--json prints the LR of each step, but {total_steps} are more than {_LONGEST_JSON}; "
            "in Python, CosineWarmRestarts(...).lr_at(step) gives any of them"
        )
    if args.plot:
        _save_picture(schedule, total_steps, args.plot)
    phases = Phases(schedule, total_steps)
    if args.json:
        entries = {
            **(answer or {}),
            "options": asdict(schedule),
            "total_steps": total_steps,
            "cycle_lengths": [schedule.cycle_length(cycle) for cycle in range(phases.n_cycles)],
            "restarts": schedule.restarts(total_steps),
            "phases": [phase._asdict() for phase in phases],
            "lr": [schedule.lr_at(step) for step in range(total_steps)],
        }
        print(json.dumps(entries))
        return

    heading, drawing = (bold, cyan) if _is_coloured() else (plain, plain)
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
    figure = new_figure("--plot", 8, 4)
    shown_steps = beginning_of(schedule, total_steps, _MOST_CYCLES_IN_A_PICTURE)
    ax = plot_schedule(schedule, shown_steps, figure.subplots())
    ax.set_xlabel("epoch")
    if shown_steps < total_steps:
        n_cycles = Phases(schedule, total_steps).n_cycles
        ax.set_title(f"the first {_MOST_CYCLES_IN_A_PICTURE} of {n_cycles} cycles")
    figure.savefig(path, dpi=150)


def _is_coloured() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
