"""Lets timm be imported next to a CPU build of torch."""

from pathlib import Path

import pytest
from torch import library

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # Package registries have torchvision for CUDA builds of torch only. What it compiles does not
    # load here. Its Python half, all that timm needs, wants these two operators to exist.
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(f"torchvision::{operator}", schema)

LIBRARIES_OWN_WARNINGS = [
    # Lightning
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:The '.*' does not have many workers:UserWarning",
    "ignore:GPU available but not used:UserWarning",
    # Hugging Face
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
]


def pytest_collection_modifyitems(items):
    """Keeps warnings errors, but for the libraries' own."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for warning in LIBRARIES_OWN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
