"""``sgdr-fused fit``: the ``T_0`` for which a number of cycles fits a budget."""

from __future__ import annotations

import argparse
from dataclasses import replace

from sgdr_fused.cli.parser import Commands, integer, real
from sgdr_fused.cli.report import add_output_options, report
from sgdr_fused.schedule import CosineWarmRestarts, fit_T_0
from sgdr_fused.values import LENGTH

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: Those of the command line.
    """
    parser = commands.add_parser(
        "fit",
        help="the T_0 for which a number of cycles fits a budget",
        description="The longest first cycle for which a number of cycles fits a budget.",
    )
    parser.set_defaults(command=_show_fit)
    parser.add_argument("--epochs", type=integer, required=True, help="the budget, without warm-up")
    parser.add_argument("--cycles", type=integer, required=True, help="number of cycles")
    parser.add_argument("--T-mult", type=real, default=1, help="each cycle is longer by")
    parser.add_argument("--lr", type=real, default=0.1, help="the peak (%(default)s)")
    add_output_options(parser)


def _show_fit(args: argparse.Namespace) -> None:
    # fit_T_0() would name its own arguments.
    for name in ("epochs", "cycles"):
        LENGTH.plain(f"--{name}", getattr(args, name))
    T_0 = fit_T_0(args.epochs, args.cycles, args.T_mult)
    schedule = CosineWarmRestarts(lr=args.lr, T_0=T_0, T_mult=args.T_mult, n_cycles=args.cycles)
    used = schedule.cycle_start(args.cycles)
    cycles = "1 cycle" if args.cycles == 1 else f"{args.cycles} cycles"
    answer = f"T_0={T_0}: {cycles} in {used} of {args.epochs} epochs"
    if used < args.epochs:
        needed = replace(schedule, T_0=T_0 + 1).cycle_start(args.cycles)
        answer += f"; {args.epochs - used} left over, T_0={T_0 + 1} would need {needed}"
    report(schedule, used, args, {"T_0": T_0, "epochs_used": used}, [answer])
