"""A whole training iteration as one CUDA graph, beside the same training run eagerly.

Forward in bfloat16 autocast, backward, clipping, the update, an average of the weights and the
schedule over its restarts are captured once; each iteration then is a copy of the batch and one
replay. The losses of both runs are compared, and their speed. Without a GPU the training runs
eagerly only.

    python examples/cuda_graph.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgdr_fused import FusedSGDR, fit_T_0

BATCH_SIZE = 64
N_CYCLES = 3


class Data(NamedTuple):
    """Noisy pictures of ten patterns: images (n, 1, 8, 8), labels (n,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def make(cls, device: str, seed: int) -> Data:
        """1,437 pictures to train with, 360 for the test."""
        draws = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, [1797], generator=draws)
        patterns = torch.randn(10, 1, 8, 8, generator=draws)
        images = patterns[labels] + 2 * torch.randn(1797, 1, 8, 8, generator=draws)
        images, labels = images.to(device), labels.to(device)
        return cls(images[:-360], labels[:-360], images[-360:], labels[-360:])


class Block(nn.Module):
    """Two convolutions and a residual; no batch norm, whose statistics a warm-up would change."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, channels, 8, 8), as the result."""
        return x + self.layers(x)


class Training:
    """A model, its optimizer, and the memory that an iteration reads and writes.

    Attributes:
        image: The batch, shape (64, 1, 8, 8); an iteration reads it where it is.
        label: Its labels, shape (64,).
        loss: The last iteration's loss.
    """

    def __init__(self, device: str, n_steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        blocks = [Block(16) for _ in range(4)]
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(1024, 10)
        ).to(device)
        self.optimizer = FusedSGDR(
            self.model.parameters(),
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            T_0=fit_T_0(n_steps, N_CYCLES, T_mult=2),
            T_mult=2,
            max_grad_norm=1.0,
            ema_decay=0.98,
        )
        self.image = torch.zeros(BATCH_SIZE, 1, 8, 8, device=device)
        self.label = torch.zeros(BATCH_SIZE, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)

    def forward_and_backward(self) -> None:
        """Gradients and loss of the batch."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.image.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.image), self.label)
        loss.backward()
        self.loss.copy_(loss.detach())

    def iteration(self) -> None:
        """Clips, updates, averages, and advances the schedule: all of it is ``step()``."""
        self.forward_and_backward()
        self.optimizer.step()

    def captured_iteration(self) -> Callable[[], None]:
        """The iteration as a graph's replay. Nothing is updated by the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Libraries choose and allocate at their first calls, which a graph must not hold.
            for _ in range(3):
                self.forward_and_backward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.iteration()
        return graph.replay

    def accuracy(self, data: Data) -> float:
        """Share of the test pictures that the averaged weights get right."""
        with self.optimizer.swap_ema(), torch.no_grad():
            found = self.model(data.test_images).argmax(1)
        return (found == data.test_labels).float().mean().item()


class Run(NamedTuple):
    """What one training did: a loss a step, on the CPU, and its seconds an iteration."""

    losses: Tensor
    seconds: float
    accuracy: float
    restarts: int


def run(training: Training, data: Data, batches: Sequence[Tensor], in_graph: bool) -> Run:
    """Trains on the batches, given as indices of images."""
    iteration = training.captured_iteration() if in_graph else training.iteration
    losses = torch.zeros(len(batches), device=training.loss.device)
    _wait(training)
    begin = time.perf_counter()
    for step, batch in enumerate(batches):
        torch.index_select(data.images, 0, batch, out=training.image)
        torch.index_select(data.labels, 0, batch, out=training.label)
        iteration()
        losses[step].copy_(training.loss)
    _wait(training)
    seconds = (time.perf_counter() - begin) / len(batches)
    return Run(losses.cpu(), seconds, training.accuracy(data), training.optimizer.cycle)


def _wait(training: Training) -> None:
    if training.loss.is_cuda:
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Trains, and prints losses and speed; returns the runs by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = Data.make(device, arguments.seed)
    order = torch.Generator().manual_seed(arguments.seed)
    batches = [
        batch.to(device)
        for _ in range(arguments.epochs)
        for batch in torch.randperm(len(data.images), generator=order).split(BATCH_SIZE)
        if len(batch) == BATCH_SIZE
    ]

    runs: dict[str, Run] = {}
    for name, in_graph in {"eager": False, "in a CUDA graph": True}.items():
        if in_graph and device == "cpu":
            print("There is no GPU here, so there is nothing to capture: the eager run is all.")
            continue
        training = Training(device, len(batches), arguments.seed)
        if not in_graph:
            run(Training(device, len(batches), arguments.seed), data, batches[:3], in_graph)
        # So that the two differ by what they replay only.
        with torch.backends.cudnn.flags(deterministic=True):
            found = runs[name] = run(training, data, batches, in_graph)
        print(
            f"{name:16} {1e3 * found.seconds:7.3f} ms an iteration, {found.restarts} restarts, "
            f"last loss {found.losses[-1]:.4f}, test accuracy {found.accuracy:.1%}"
        )
    if len(runs) == 2:
        eager, graph = runs.values()
        difference = (eager.losses - graph.losses).abs().max().item()
        print(f"{eager.seconds / graph.seconds:.1f} times as fast in the graph")
        print(f"Largest difference between the losses of one step: {difference:g}")
    return runs


if __name__ == "__main__":
    main()
