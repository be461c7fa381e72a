"""Trains a small network on handwritten digits in bfloat16, with a small learning rate.

Most updates are then below half the distance between two bfloat16 numbers. Rounding to nearest
loses them; with stochastic rounding or float32 master weights they accumulate.

    python examples/bfloat16.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from sgdr_fused import FusedSGDR

BATCH_SIZE = 64
N_TEST = 360
LR = 0.003
FULL = "float32"
NEAREST = "bfloat16"
STOCHASTIC = "bfloat16, stochastic_rounding"
MASTER = "bfloat16, master_weights"
WAYS: dict[str, dict[str, Any]] = {
    FULL: {},
    NEAREST: {},
    STOCHASTIC: {"stochastic_rounding": True},
    MASTER: {"master_weights": True},
}


def accuracy(way: str, seed: int, epochs: int) -> float:
    """Trains once and returns the test accuracy, from 0 to 1."""
    raw_images, raw_labels = load_digits(return_X_y=True)
    dtype = torch.float32 if way == FULL else torch.bfloat16
    images = (torch.tensor(raw_images, dtype=torch.float32) / 16).to(dtype)
    labels = torch.tensor(raw_labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    test, train = order[:N_TEST], order[N_TEST:]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    steps = epochs * (len(train) // BATCH_SIZE)
    optimizer = FusedSGDR(
        network.parameters(), lr=LR, momentum=0.9, T_0=steps, seed=seed, **WAYS[way]
    )
    for _ in range(epochs):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for batch in shuffled.split(BATCH_SIZE)[: len(train) // BATCH_SIZE]:
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]).float(), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        guesses = network(images[test]).argmax(dim=1)
    return (guesses == labels[test]).double().mean().item()


def reaches(accuracies: Sequence[float], full: Sequence[float]) -> bool:
    """Whether accuracies reach those of float32, compared seed by seed.

    They do if their mean is below by at most two standard errors of the difference, or by at most
    one image, whichever is more.
    """
    differences = [mine - theirs for mine, theirs in zip(accuracies, full, strict=True)]
    error = 0.0
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences) >= -max(2 * error, 1 / N_TEST)


def draw(results: dict[str, list[float]], path: Path) -> None:
    """Draws a point for each seed and a bar for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for row, (way, accuracies) in enumerate(results.items()):
        color = "#e8b98a" if way == NEAREST else "#1f4e79"
        ax.barh(row, 100 * statistics.mean(accuracies), color=color, height=0.6)
        ax.plot([100 * a for a in accuracies], [row] * len(accuracies), "o", color="0.2", ms=4)
    ax.set_yticks(range(len(results)), list(results))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("test accuracy, % (bar: mean, points: seeds)")
    ax.set_title("A small learning rate in bfloat16", loc="left", fontsize=10, fontweight="bold")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains in every way; writes bfloat16.json and bfloat16.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "build")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # the network is tiny
    results: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way, accuracies in results.items():
            if sys.stderr.isatty():
                print(f"\rseed {seed + 1} of {options.seeds}: {way:40}", end="", file=sys.stderr)
            accuracies.append(accuracy(way, seed, options.epochs))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    verdicts = {way: reaches(found, results[FULL]) for way, found in results.items()}
    for way, found in results.items():
        said = "reaches float32" if verdicts[way] else "does not reach float32"
        seeds = ", ".join(f"{100 * a:.1f}" for a in found)
        print(f"{way:32}{100 * statistics.mean(found):6.1f} %  ({seeds})  {said}")
    written = {"epochs": options.epochs, "lr": LR, "accuracies": results, "reaches": verdicts}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bfloat16.json").write_text(json.dumps(written, indent=1) + "\n")
    draw(results, options.out / "bfloat16.png")


if __name__ == "__main__":
    main()
