"""Trains a small network on handwritten digits: with the pair, with FusedSGDR, and resumed.

The pair is torch.optim.SGD with CosineAnnealingWarmRestarts. From one seed both give the same
losses to the last bit, and so does a FusedSGDR run that resumes from a checkpoint within a cycle.

    python examples/digits.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import sgdr_fused
from sgdr_fused import CosineWarmRestarts, FusedSGDR, fit_T_0

BUILD = Path(__file__).parent.parent / "build"
BATCH_SIZE = 64
N_TEST = 360
N_CYCLES = 3
PAIR = "SGD + CosineAnnealingWarmRestarts"
OPTIONS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": True}


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, and the order of the batches.

    Attributes:
        train_images: Shape (1437, 1, 8, 8), values from 0 to 1.
        train_labels: Shape (1437,).
        test_images: Shape (360, 1, 8, 8).
        test_labels: Shape (360,).
        batches: Indices of the training images, one tensor a step.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    batches: list[Tensor]

    @classmethod
    def load(cls, epochs: int, seed: int) -> Digits:
        """Splits and shuffles the images with a seed."""
        raw_images, raw_labels = load_digits(return_X_y=True)
        images = torch.tensor(raw_images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        labels = torch.tensor(raw_labels)
        generator = torch.Generator().manual_seed(seed)
        test, train = torch.randperm(len(images), generator=generator).split(
            [N_TEST, len(images) - N_TEST]
        )
        batches = []
        for _ in range(epochs):
            batches += torch.randperm(len(train), generator=generator).split(BATCH_SIZE)
        return cls(images[train], labels[train], images[test], labels[test], batches)


@dataclass
class Run:
    """One training: its network, the loss of every step and the time spent in the optimizer."""

    name: str
    network: nn.Module
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    optimizer_seconds: float = 0.0

    def train(
        self,
        digits: Digits,
        steps: range,
        optimizer: Optimizer,
        step: Callable[[], object],
        after_step: Callable[[int], object] = lambda i: None,
    ) -> None:
        """Trains on some of the batches.

        Args:
            digits: Images and batches.
            steps: Indices of the batches.
            optimizer: Clears the gradients and gives the LR.
            step: Updates the network and advances the schedule.
            after_step: Called after each step, with its index.
        """
        self.network.train()
        for i in progress(self.name, steps, len(digits.batches)):
            batch = digits.batches[i]
            optimizer.zero_grad()
            loss = F.cross_entropy(
                self.network(digits.train_images[batch]), digits.train_labels[batch]
            )
            loss.backward()
            self.lrs.append(float(optimizer.param_groups[0]["lr"]))
            start = time.perf_counter()
            step()
            self.optimizer_seconds += time.perf_counter() - start
            self.losses.append(loss.item())
            after_step(i)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        """Test accuracy, from 0 to 1."""
        self.network.eval()
        guesses = self.network(digits.test_images).argmax(dim=1)
        return (guesses == digits.test_labels).double().mean().item()


def new_network(seed: int) -> nn.Module:
    """Two convolutions and a linear layer: 3,850 parameters in 8 tensors."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def progress(name: str, steps: range, n_steps: int) -> Iterator[int]:
    """Yields the steps; shows a bar on a terminal, prints four lines elsewhere."""
    on_terminal = sys.stdout.isatty()
    for i in steps:
        yield i
        done = i + 1
        if on_terminal:
            bar = "━" * (30 * done // n_steps)
            print(f"\r{name:<18}  {bar:─<30}  {done:>4}/{n_steps}", end="", flush=True)
        elif done * 4 // n_steps > i * 4 // n_steps:
            print(f"{name:<18}  step {done:>4} of {n_steps}", flush=True)
    if on_terminal:
        print()


def train_pair(digits: Digits, seed: int, **schedule: Any) -> Run:
    """Trains with torch's own optimizer and scheduler."""
    run = Run("SGD + scheduler", new_network(seed))
    optimizer = SGD(run.network.parameters(), **OPTIONS)
    scheduler = CosineAnnealingWarmRestarts(optimizer, **schedule)

    def step() -> None:
        optimizer.step()
        scheduler.step()

    run.train(digits, range(len(digits.batches)), optimizer, step)
    return run


def train_fused(digits: Digits, seed: int, save_at: int, checkpoint: Path, **schedule: Any) -> Run:
    """Trains with FusedSGDR and saves a checkpoint after ``save_at`` steps."""
    run = Run("FusedSGDR", new_network(seed))
    optimizer = FusedSGDR(run.network.parameters(), **OPTIONS, **schedule)

    def save(i: int) -> None:
        if i + 1 == save_at:
            state = {"network": run.network.state_dict(), "optimizer": optimizer.state_dict()}
            sgdr_fused.save(state, checkpoint)

    run.train(digits, range(len(digits.batches)), optimizer, optimizer.step, after_step=save)
    return run


def resume_fused(digits: Digits, save_at: int, checkpoint: Path, **schedule: Any) -> Run:
    """Resumes that training with a new network and a new optimizer."""
    run = Run("FusedSGDR, resumed", new_network(seed=12345))
    optimizer = FusedSGDR(run.network.parameters(), **OPTIONS, **schedule)
    state = sgdr_fused.load(checkpoint)
    run.network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    run.train(digits, range(save_at, len(digits.batches)), optimizer, optimizer.step)
    return run


def is_identical(run: Run, other: Run) -> bool:
    """Whether two networks hold the same bits."""
    mine, theirs = run.network.state_dict(), other.network.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def draw(path: Path, pair: Run, fused: Run, restarts: list[int], save_at: int, text: str) -> None:
    """Draws both loss curves, one over the other, and the LR below.

    Args:
        path: Picture to write.
        pair: The run drawn as a broad line.
        fused: The run drawn as a fine line on top of it.
        restarts: Steps to mark.
        save_at: Number of steps before the checkpoint.
        text: Subtitle.
    """
    from matplotlib.figure import Figure

    pale, dark, grey = "#f4b886", "#14304d", "0.45"
    figure = Figure(figsize=(8, 5.2), dpi=200, layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, 1))

    top.plot(pair.losses, color=pale, linewidth=5.5, solid_joinstyle="round", label=PAIR)
    top.plot(fused.losses, color=dark, linewidth=0.9, label="FusedSGDR")
    top.set_yscale("log")
    top.set_ylabel("training loss")
    top.legend(frameon=False, loc="upper right")
    top.set_title("Handwritten digits, the same training twice", loc="left", fontsize=13, pad=22)
    top.text(0, 1.03, text, transform=top.transAxes, color=grey, fontsize=9.5)

    for start, end in itertools.pairwise([0, *restarts, len(fused.lrs)]):
        bottom.plot(range(start, end), fused.lrs[start:end], color=dark, linewidth=1.5)
    bottom.plot(save_at, fused.lrs[save_at], "o", color="#c8501e", markersize=6)
    bottom.annotate(
        "saved here; the resumed run\nends with the same bits",
        (save_at, fused.lrs[save_at]),
        xytext=(7, 1),
        textcoords="offset points",
        color="#c8501e",
        fontsize=8.5,
        verticalalignment="bottom",
    )
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.set_ylim(0, 1.12 * max(fused.lrs))

    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
        for restart in restarts:
            ax.axvline(restart, color="0.75", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    for restart in restarts:
        top.annotate(
            "restart",
            (restart, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color=grey,
            fontsize=8.5,
        )
    figure.align_ylabels()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """Trains three times; prints the results and writes a picture and JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUILD / "digits.png")
    arguments = parser.parse_args(argv)

    # On one thread a convolution adds in one order, so runs repeat to the bit.
    torch.set_num_threads(1)
    digits = Digits.load(arguments.epochs, arguments.seed)
    n_steps = len(digits.batches)
    schedule = {"T_0": fit_T_0(n_steps, N_CYCLES, T_mult=2), "T_mult": 2}
    restarts = CosineWarmRestarts(lr=OPTIONS["lr"], **schedule).restarts(n_steps)
    save_at = 2 * n_steps // 3

    pair = train_pair(digits, arguments.seed, **schedule)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        fused = train_fused(digits, arguments.seed, save_at, checkpoint, **schedule)
        resumed = resume_fused(digits, save_at, checkpoint, **schedule)
    assert is_identical(resumed, fused), "the resumed run ended with other parameters"
    assert resumed.losses == fused.losses[save_at:], "the resumed run had other losses"

    difference = max(abs(a - b) for a, b in zip(pair.losses, fused.losses, strict=True))
    milliseconds = [1000 * run.optimizer_seconds for run in (pair, fused)]
    speedup = milliseconds[0] / milliseconds[1]
    print(
        f"""
                      test accuracy   in the optimizer
{pair.name:<20}  {pair.accuracy(digits):>13.2%}   {milliseconds[0]:>13.1f} ms
{fused.name:<20}  {fused.accuracy(digits):>13.2%}   {milliseconds[1]:>13.1f} ms   {speedup:.1f}x

Largest difference between the two loss curves: {difference}
Resumed from step {save_at} of {n_steps}: parameters and losses identical to the last bit"""
    )

    results = {
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "steps": n_steps,
        "restarts": restarts,
        "test_accuracy": {run.name: run.accuracy(digits) for run in (pair, fused, resumed)},
        "final_loss": {run.name: run.losses[-1] for run in (pair, fused, resumed)},
        "largest_loss_difference": difference,
        "same_parameters_as_the_pair": is_identical(pair, fused),
        "optimizer_ms": {
            run.name: round(ms, 3) for run, ms in zip((pair, fused), milliseconds, strict=True)
        },
        "resumed_at_step": save_at,
        "resumed_is_identical": is_identical(resumed, fused),
        "torch": torch.__version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = (
        f"Largest difference between the losses: {difference:g}.  Time spent in the optimizer: "
        f"{milliseconds[0]:.0f} ms, with FusedSGDR {milliseconds[1]:.0f} ms."
    )
    draw(arguments.out, pair, fused, restarts, save_at, text)
    print(f"Wrote {arguments.out} and {arguments.out.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
