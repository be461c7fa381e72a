"""Parameter shapes to benchmark on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = ["Shapes", "mlp", "numel", "resnet50", "small_tensors"]

Shapes = list[tuple[int, ...]]


def mlp(widths: Sequence[int] = (64, 96, 32, 10)) -> Shapes:
    """Weights and biases of a multi-layer perceptron; by default 6 tensors, 9,674 elements."""
    shapes: Shapes = []
    for n_in, n_out in itertools.pairwise(widths):
        shapes += [(n_out, n_in), (n_out,)]
    return shapes


def small_tensors(n_tensors: int, numel_each: int = 64) -> Shapes:
    """Many small tensors, for which the cost of a step is the cost per tensor."""
    return [(numel_each,)] * n_tensors


def resnet50(width: int = 64, n_classes: int = 1000) -> Shapes:
    """The parameters of torchvision's ResNet-50, in its order: 161 tensors, 25,557,032 elements.

    Args:
        width: Channels of the first convolution; fewer make a smaller network of the same layers.
        n_classes: Outputs of the last layer.

    References:
        He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, table 1.
    """
    shapes: Shapes = []

    def conv_and_norm(n_in: int, n_out: int, kernel: int) -> None:
        shapes.extend([(n_out, n_in, kernel, kernel), (n_out,), (n_out,)])

    conv_and_norm(3, width, 7)
    n_in = width
    for stage, n_blocks in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for block in range(n_blocks):
            conv_and_norm(n_in, inner, 1)
            conv_and_norm(inner, inner, 3)
            conv_and_norm(inner, 4 * inner, 1)
            if block == 0:
                conv_and_norm(n_in, 4 * inner, 1)  # the projection on the shortcut
            n_in = 4 * inner
    return [*shapes, (n_classes, n_in), (n_classes,)]


def numel(shapes: Shapes) -> int:
    """Number of elements of all the tensors together."""
    return sum(math.prod(shape) for shape in shapes)
