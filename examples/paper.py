"""The SGDR paper's comparisons, in small: step decay, one cosine, warm restarts, and snapshots.

Trains a small network on scikit-learn's 1,797 digits, with clean training labels and with 20 % of
them wrong, over many seeds, each with its own split. Each method uses the initial learning rate
with the least error on validation images. Prints which of the paper's findings hold here.

Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
https://arxiv.org/abs/1608.03983.

    python examples/paper.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR

from sgdr_fused import FusedSGDR
from sgdr_fused.snapshots import Snapshots

BATCH_SIZE = 64
N_TEST, N_VALIDATION = 597, 200
LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
NOISES = (0.0, 0.2)
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
STEP_DECAY = "step decay"
COSINE = "one cosine"
SGDR = "SGDR, T_0=10, T_mult=2"
SNAPSHOTS = "SGDR, 3 snapshots"
TRAININGS = (STEP_DECAY, COSINE, SGDR)
METHODS = (*TRAININGS, SNAPSHOTS)


@dataclass(frozen=True)
class Relation:
    """One of the paper's findings: a method's test error is below another's.

    Attributes:
        better: The method with the lower error.
        worse: The method with the higher error.
        in_the_paper: The difference in points, and the data set.
    """

    better: str
    worse: str
    in_the_paper: str


RELATIONS = (
    Relation(COSINE, STEP_DECAY, "0.1 to 0.3 on CIFAR-10"),
    Relation(SNAPSHOTS, SGDR, "0.5 on CIFAR-10, 1.8 on CIFAR-100"),
)


@dataclass(frozen=True)
class Job:
    """The settings of one training."""

    method: str
    noise: float
    lr: float
    seed: int
    epochs: int


@dataclass(frozen=True)
class Split:
    """One seed's split: ``images[part]``, ``labels[part]`` for "train", "validation", "test"."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]

    @classmethod
    def load(cls, seed: int, noise: float) -> Split:
        """Splits the digits; replaces a share ``noise`` of the training labels by another digit."""
        raw_images, raw_labels = load_digits(return_X_y=True)
        images = torch.tensor(raw_images, dtype=torch.float32) / 16
        labels = torch.tensor(raw_labels)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        sizes = [N_TEST, N_VALIDATION, len(images) - N_TEST - N_VALIDATION]
        parts = dict(zip(("test", "validation", "train"), order.split(sizes), strict=True))
        of_part = {part: labels[indices] for part, indices in parts.items()}
        wrong = torch.randperm(sizes[2], generator=generator)[: round(noise * sizes[2])]
        shift = torch.randint(1, 10, (len(wrong),), generator=generator)
        of_part["train"][wrong] = (of_part["train"][wrong] + shift) % 10
        return cls({part: images[indices] for part, indices in parts.items()}, of_part)

    def error(self, part: str, outputs: Tensor) -> float:
        """Classification error on a part of the images, in per cent."""
        return 100 * (outputs.argmax(dim=1) != self.labels[part]).double().mean().item()


def train(job: Job) -> dict[str, dict[str, float]]:
    """Trains once.

    Returns:
        The error in per cent, by method and by part of the images ("validation", "test"). A
        training with restarts gives two methods: SGDR and its snapshots.
    """
    split = Split.load(job.seed, job.noise)
    torch.manual_seed(job.seed)
    network = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    shuffle = torch.Generator().manual_seed(job.seed)
    n_train = len(split.labels["train"])
    batches = [
        batch
        for _ in range(job.epochs)
        for batch in torch.randperm(n_train, generator=shuffle).split(BATCH_SIZE)
    ]
    snapshots = None
    optimizer: torch.optim.Optimizer
    if job.method == STEP_DECAY:
        # As in the paper: to a fifth after 30, 60 and 80 % of the epochs.
        optimizer = torch.optim.SGD(network.parameters(), lr=job.lr, **OPTIONS)
        milestones = [len(batches) * share // 100 for share in (30, 60, 80)]
        scheduler = MultiStepLR(optimizer, milestones, gamma=0.2)
    elif job.method == COSINE:
        optimizer = FusedSGDR(network.parameters(), lr=job.lr, T_0=len(batches), **OPTIONS)
    else:
        # Three cycles of 1, 2 and 4 sevenths: 10, 20 and 40 of 70 epochs.
        T_0 = max(1, len(batches) // 7)
        optimizer = FusedSGDR(
            network.parameters(), lr=job.lr, T_0=T_0, T_mult=2, n_cycles=3, **OPTIONS
        )
        snapshots = Snapshots(network, optimizer, keep=3)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(
            network(split.images["train"][batch]), split.labels["train"][batch]
        ).backward()
        optimizer.step()
        if job.method == STEP_DECAY:
            scheduler.step()
        if snapshots is not None:
            snapshots.update()
    errors = {}
    with torch.no_grad():
        errors[job.method] = {
            part: split.error(part, network(split.images[part])) for part in ("validation", "test")
        }
    if snapshots is not None:
        errors[SNAPSHOTS] = {
            part: split.error(part, snapshots.predict(split.images[part]))
            for part in ("validation", "test")
        }
    return errors


def trained(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, dict[str, float]]]:
    """Yields the result of each training, in order."""
    if processes == 1:
        yield from map(train, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap(train, jobs)


def train_all(jobs: Sequence[Job], processes: int, title: str) -> Iterator[tuple[Job, Any]]:
    """Trains; shows a bar on a terminal, prints a few lines elsewhere."""
    on_terminal = sys.stderr.isatty()
    results = zip(jobs, trained(jobs, processes), strict=True)
    for done, job_and_result in enumerate(results, start=1):
        yield job_and_result
        if on_terminal:
            bar = "━" * (30 * done // len(jobs))
            end = "\n" if done == len(jobs) else ""
            line = f"\r{title:<24}{bar:─<30}  {done:>4} of {len(jobs)} trainings"
            print(line, end=end, file=sys.stderr, flush=True)
        elif done * 4 // len(jobs) > (done - 1) * 4 // len(jobs):
            print(f"{title}: {done} of {len(jobs)} trainings", file=sys.stderr, flush=True)


def choose_lrs(epochs: int, seeds: int, processes: int) -> dict[tuple[str, float], float]:
    """The initial LR with the least validation error, for each training and noise."""
    jobs = [
        Job(method, noise, lr, seed, epochs)
        for method, noise, lr, seed in itertools.product(TRAININGS, NOISES, LRS, range(seeds))
    ]
    errors: dict[tuple[str, float], dict[float, float]] = {}
    for job, found in train_all(jobs, processes, "choosing learning rates"):
        of_lr = errors.setdefault((job.method, job.noise), dict.fromkeys(LRS, 0.0))
        of_lr[job.lr] += found[job.method]["validation"]
    return {key: min(of_lr, key=of_lr.__getitem__) for key, of_lr in errors.items()}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the values' mean; infinite for a single value."""
    if len(values) < 2:
        return float("inf")
    return statistics.stdev(values) / len(values) ** 0.5


def judge(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """Compares the errors of two methods, seed by seed.

    Returns:
        ``gain`` in points, its ``standard_error``, and a ``verdict``: the finding or its contrary
        holds if the gain is more than two standard errors away from zero.
    """
    gains = [w - b for b, w in zip(better, worse, strict=True)]
    gain, error = statistics.mean(gains), standard_error(gains)
    verdict = "cannot be told apart here"
    if abs(gain) > 2 * error:
        verdict = "holds here" if gain > 0 else "does not hold here: the contrary does"
    return {"gain": gain, "standard_error": error, "verdict": verdict}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the errors of all methods: a point for the mean, a bar of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(results), sharey=True)
    for ax, result in zip(axes, results, strict=True):
        for row, method in enumerate(METHODS):
            errors = result["errors"][method]
            color = "#c8501e" if method == SNAPSHOTS else "#1f4e79"
            ax.plot(errors, [row] * len(errors), "|", color="0.8", markersize=9, zorder=0)
            ax.errorbar(
                statistics.mean(errors),
                row,
                xerr=standard_error(errors),
                fmt="o",
                color=color,
                capsize=4,
                markersize=5,
            )
        ax.set_yticks(range(len(METHODS)), METHODS)
        ax.set_ylim(len(METHODS) - 0.5, -0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("test error, % (mean ± standard error; grey: seeds)", fontsize=8)
        ax.set_title(title_of(result["noise"]), loc="left", fontsize=10, fontweight="bold")
    figure.savefig(path)


def title_of(noise: float) -> str:
    """Title for a share of wrong training labels."""
    return f"{noise:.0%} of the training labels wrong" if noise else "clean labels"


def main(argv: Sequence[str] | None = None) -> None:
    """Trains; prints the errors and the verdicts; writes paper.json and paper.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "build")
    options = parser.parse_args(argv)

    lrs = choose_lrs(options.epochs, min(4, options.seeds), options.processes)
    jobs = [
        Job(method, noise, lrs[method, noise], seed, options.epochs)
        for noise, seed, method in itertools.product(NOISES, range(options.seeds), TRAININGS)
    ]
    errors: dict[float, dict[str, list[float]]] = {
        noise: {method: [] for method in METHODS} for noise in NOISES
    }
    for job, found in train_all(jobs, options.processes, "training"):
        for method, of_part in found.items():
            errors[job.noise][method].append(of_part["test"])

    results = []
    for noise, of_method in errors.items():
        print(f"\nTest error in per cent, {title_of(noise)}, {options.seeds} seeds")
        for method, values in of_method.items():
            lr = lrs[SGDR if method == SNAPSHOTS else method, noise]
            mean = f"{statistics.mean(values):5.2f} ± {standard_error(values):.2f}"
            print(f"  {method:<24}{mean}   lr={lr:g}")
        relations = []
        for relation in RELATIONS:
            judged = judge(of_method[relation.better], of_method[relation.worse])
            relations.append(asdict(relation) | judged)
            print(
                f"  {relation.better} against {relation.worse}: "
                f"{judged['gain']:+.2f} ± {judged['standard_error']:.2f} points "
                f"(in the paper {relation.in_the_paper}): {judged['verdict']}"
            )
        of_noise = {method: lrs[method, noise] for method in TRAININGS}
        results.append(
            {"noise": noise, "lr": of_noise, "errors": of_method, "relations": relations}
        )
    written = {"epochs": options.epochs, "torch": torch.__version__, "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "paper.json").write_text(json.dumps(written, indent=1) + "\n")
    draw(results, options.out / "paper.png")


if __name__ == "__main__":
    main()
