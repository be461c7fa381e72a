"""``sgdr-fused schedule``: the cycles and the LR of a training."""

from __future__ import annotations

import argparse

from sgdr_fused.cli.parser import Commands, integer, real
from sgdr_fused.cli.report import add_output_options, report
from sgdr_fused.schedule import CosineWarmRestarts

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: Those of the command line.
    """
    parser = commands.add_parser(
        "schedule",
        help="the cycles and the LR of a training",
        description="The cycles and the LR of a training, as a table and a curve.",
    )
    parser.set_defaults(command=_show_schedule)
    parser.add_argument("--epochs", type=integer, required=True, help="length of the training")
    parser.add_argument("--T-0", type=integer, required=True, help="epochs of the first cycle")
    parser.add_argument("--T-mult", type=real, default=1, help="each cycle is longer by")
    parser.add_argument("--lr", type=real, default=0.1, help="the first peak (%(default)s)")
    parser.add_argument("--eta-min", type=real, default=0.0, help="the floor (%(default)s)")
    parser.add_argument("--steps-per-epoch", type=integer, default=1, help="(%(default)s)")
    parser.add_argument("--anneal", default="step", help="step or epoch (%(default)s)")
    parser.add_argument("--warmup-steps", type=integer, default=0, help="(%(default)s)")
    parser.add_argument("--warmup-start-lr", type=real, default=0.0, help="(%(default)s)")
    parser.add_argument("--cycle-decay", type=real, default=1.0, help="each peak is lower by")
    parser.add_argument("--n-cycles", type=integer, help="cycles before the LR stays at the floor")
    add_output_options(parser)


def _show_schedule(args: argparse.Namespace) -> None:
    names = CosineWarmRestarts.__dataclass_fields__
    schedule = CosineWarmRestarts(**{name: getattr(args, name) for name in names})
    report(schedule, args.epochs, args)
