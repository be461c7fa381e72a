"""The schedule as text: a table of its cycles and a curve of characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgdr_fused.cli.phases import Phase, Phases, beginning_of, steps_to_draw
from sgdr_fused.schedule import CosineWarmRestarts

__all__ = ["Style", "bold", "curve", "cyan", "plain", "table"]

Style = Callable[[str], str]
"""Styles a piece of text, for example in bold."""

# Samples of the LR in each column of the curve.
_STEPS_IN_A_COLUMN = 16
_LONGEST_TABLE = 24
# With fewer, on average, the curve is a solid block.
_COLUMNS_OF_A_CYCLE = 4


def plain(text: str) -> str:
    """The text as it is."""
    return text


def bold(text: str) -> str:
    """The text in bold, for a terminal."""
    return f"\x1b[1m{text}\x1b[0m"


def cyan(text: str) -> str:
    """The text in cyan, for a terminal."""
    return f"\x1b[36m{text}\x1b[0m"


def table(phases: Sequence[Phase], steps_per_epoch: int, style: Style = plain) -> list[str]:
    """A line for each phase; a long table is cut in the middle.

    Args:
        phases: The phases of the training.
        steps_per_epoch: If it is above 1, lengths are in steps, and there is a column of steps.
        style: Style of the heading.

    Returns:
        The lines.
    """
    in_steps = steps_per_epoch > 1
    heading = ["step", "steps"] if in_steps else ["epochs"]
    rows = [["cycle", "epoch", *heading, "first LR", "last LR"]]
    half = _LONGEST_TABLE // 2
    is_cut = len(phases) >= _LONGEST_TABLE
    for phase in [*phases[: half - 1], *phases[-half:]] if is_cut else phases:
        epoch = _in_epochs(phase.start, steps_per_epoch)
        step = [str(phase.start)] if in_steps else []
        length = f"{phase.steps} of {phase.length}" if phase.is_cut_short else str(phase.steps)
        lrs = [f"{phase.first_lr:.6g}", f"{phase.last_lr:.6g}"]
        rows.append([phase.name, epoch, *step, length, *lrs])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    if is_cut:
        lines.insert(half, f"... {len(phases) + 1 - 2 * half} more ...")
    return [style(lines[0]), *lines[1:]]


def curve(
    schedule: CosineWarmRestarts,
    total_steps: int,
    width: int = 80,
    height: int = 12,
    style: Style = plain,
) -> list[str]:
    """The LR over the training, drawn with ``*``; a ``|`` below it is a restart.

    Only the first cycles are drawn if there are too many to tell one from another; a first line
    says so.

    Args:
        schedule: The schedule.
        total_steps: Length of the training in steps.
        width: Characters in a line, including the LR's scale.
        height: Lines of the drawing, without the two of the axis.
        style: Style of the curve.

    Returns:
        The lines.
    """
    scale = max(schedule.lr, schedule.warmup_start_lr)
    labels = {0: f"{scale:.4g}", height - 1: "0"}
    margin = max(map(len, labels.values())) + 2
    n_cycles = Phases(schedule, total_steps).n_cycles
    most_cycles = max(1, (width - margin) // _COLUMNS_OF_A_CYCLE)
    total_steps = beginning_of(schedule, total_steps, most_cycles)
    columns = max(1, min(width - margin, total_steps))

    def column_of(step: int) -> int:
        return step * columns // total_steps

    def row_of(lr: float) -> int:
        return height - 1 - (round(lr / scale * (height - 1)) if scale else 0)

    cells = [[" "] * columns for _ in range(height)]
    spans: dict[int, list[int]] = {}
    for step in steps_to_draw(schedule, total_steps, columns * _STEPS_IN_A_COLUMN):
        spans.setdefault(column_of(step), []).append(row_of(schedule.lr_at(step)))
    for column, rows in spans.items():
        for row in range(min(rows), max(rows) + 1):
            cells[row][column] = "*"
    axis = ["-"] * columns
    for restart in schedule.restarts(total_steps):
        axis[column_of(restart)] = "|"
    end = f"{_in_epochs(total_steps, schedule.steps_per_epoch)} epochs"
    is_cut = n_cycles > most_cycles
    return [
        *([f"The first {most_cycles} of {n_cycles} cycles:"] if is_cut else []),
        *(
            (f"{labels.get(i, '').rjust(margin - 2)} |" + style("".join(row).rstrip())).rstrip()
            for i, row in enumerate(cells)
        ),
        " " * (margin - 1) + "+" + "".join(axis),
        " " * margin + "0" + end.rjust(max(columns - 1, len(end) + 1)),
    ]


def _in_epochs(steps: int, steps_per_epoch: int) -> str:
    whole, rest = divmod(steps, steps_per_epoch)
    return f"{steps / steps_per_epoch:g}" if rest else str(whole)
