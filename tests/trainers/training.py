"""The small training that is put through each trainer: a network on the first digits.

Nothing in it is random but the network's first weights, and a cycle never ends where an epoch does.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdr_fused import CosineWarmRestarts, FusedSGDR

BATCHES = 10
BATCH_SIZE = 32
SCHEDULE = {"T_0": 7, "T_mult": 2, "eta_min": 1e-3}
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": True}

loss_of = nn.functional.cross_entropy


def digits():
    """Images of 1x8x8 pixels and their labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    n = BATCHES * BATCH_SIZE
    return TensorDataset(images[:n], torch.tensor(labels)[:n])


def loader():
    """An epoch of ten batches, always in the same order."""
    return DataLoader(digits(), batch_size=BATCH_SIZE)


def network():
    """The same first weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def fused(model):
    """The optimizer of all these trainings."""
    return FusedSGDR(model.parameters(), **SGD_OPTIONS, **SCHEDULE)


def lrs(start, stop):
    """The LR of the steps from ``start`` to ``stop - 1``."""
    schedule = CosineWarmRestarts(SGD_OPTIONS["lr"], **SCHEDULE)
    return [schedule.lr_at(step) for step in range(start, stop)]


def trained(epochs):
    """The network after so many epochs in a bare loop: what each trainer has to give."""
    model = network()
    optimizer = fused(model)
    for _ in range(epochs):
        for images, labels in loader():
            optimizer.zero_grad()
            loss_of(model(images), labels).backward()
            optimizer.step()
    return model


def same_bits(one, other):
    """Whether two models have the same parameters, to the last bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
