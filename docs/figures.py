"""Draws the figures of the pages: `python docs/figures.py`; needs scikit-learn.

figures/how_it_works.svg is written by hand.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tables
import torch
from sklearn.datasets import load_digits

from sgdr_fused import CosineWarmRestarts, FusedSGDR, lr_range_test

FOLDER = Path(__file__).parent / "figures"

# Readable on a white page and on a dark one.
STYLE: dict[str, Any] = {
    "svg.hashsalt": "sgdr_fused",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": "#808080",
    "axes.edgecolor": "#808080",
    "axes.labelcolor": "#808080",
    "xtick.color": "#808080",
    "ytick.color": "#808080",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "path.simplify_threshold": 0.5,
    "legend.frameon": False,
}
BLUE, ORANGE = "#3b82c4", "#e07b39"

FIGURES: dict[str, dict[str, dict[str, Any]]] = {
    "cycles": {"T_0=100": {"T_0": 100}, "T_0=100, T_mult=2": {"T_0": 100, "T_mult": 2}},
    "options": {
        "warm-up, decay": {"T_0": 160, "warmup_steps": 60, "cycle_decay": 0.7},
        "two cycles, floor": {"T_0": 160, "T_mult": 2, "n_cycles": 2, "eta_min": 0.01},
    },
    "anneal": {
        'anneal="step"': {"T_0": 10, "steps_per_epoch": 20},
        'anneal="epoch"': {"T_0": 10, "steps_per_epoch": 20, "anneal": "epoch"},
    },
}
STEPS = {"cycles": 700, "options": 700, "anneal": 420}


def draw(name: str) -> None:
    """Writes one figure as SVG."""
    figure, axes = plt.subplots(figsize=(5.6, 2.5), layout="constrained")
    for color, (label, options) in zip((BLUE, ORANGE), FIGURES[name].items(), strict=True):
        schedule = CosineWarmRestarts(lr=0.1, **options)
        lrs = [schedule.lr_at(step) for step in range(STEPS[name])]
        axes.plot(lrs, drawstyle="steps-post", color=color, label=label)
    axes.set(xlabel="optimizer step", ylabel="LR", ylim=(0, None), xlim=(0, STEPS[name]))
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def draw_h100() -> None:
    """Writes the README's picture: the pair and FusedSGDR on a GPU, eager and in a graph."""
    cases = tables.cases_of_the_picture(tables.benchmark(tables.GPU))
    figure, panels = plt.subplots(1, len(cases), figsize=(10, 2.8), layout="constrained")
    for axes, case in zip(panels, cases, strict=True):
        steps = tables.steps_of(case)
        for color, label, names in (
            (ORANGE, "SGD(fused=True) + scheduler", (tables.FUSED, tables.IN_GRAPH)),
            (BLUE, "FusedSGDR", (tables.OURS, tables.OURS_IN_GRAPH)),
        ):
            places = [0, 1] if color == ORANGE else [0.4, 1.4]
            bars = axes.bar(places, [steps[n] for n in names], 0.38, color=color, label=label)
            axes.bar_label(bars, [tables.time(steps[n]) for n in names], fontsize=8, padding=2)
        axes.set_xticks([0.2, 1.2], ["", "in a CUDA graph"], fontsize=9)
        axes.set_yticks([])
        axes.margins(y=0.15)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(case["title"].replace(", ", "\n", 1).replace(" of ", "\nof "), fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    figure.savefig(FOLDER / "h100.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def draw_lr_range_test() -> None:
    """Writes the picture of a range test, as the recipe does it."""
    torch.manual_seed(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = FusedSGDR(model.parameters(), lr=0.1, momentum=0.9, T_0=10)

    def train_step() -> torch.Tensor:
        batch = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step()
        return loss

    result = lr_range_test(model, optimizer, train_step)
    result.plot(str(FOLDER / "lr_range_test.svg"))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the same file each time
    with plt.rc_context(STYLE):
        for name in FIGURES:
            draw(name)
        draw_h100()
        with plt.rc_context({"savefig.transparent": True}):
            draw_lr_range_test()
