"""Shapes of the parameters that the benchmarks update. A test compares them with timm's models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = [
    "Shapes",
    "convnext_tiny",
    "gpt2",
    "mlp",
    "numel",
    "resnet18",
    "resnet50",
    "small_tensors",
    "vit",
]

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


def resnet18() -> Shapes:
    """The parameters of ResNet-18: 62 tensors, 11,689,512 elements.

    References:
        He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, table 1.
    """
    shapes, n_in = _conv_and_norm(3, 64, 7), 64
    for width, block in itertools.product((64, 128, 256, 512), range(2)):
        shapes += _conv_and_norm(n_in, width, 3) + _conv_and_norm(width, width, 3)
        if block == 0 and n_in != width:
            shapes += _conv_and_norm(n_in, width, 1)  # the projection on the shortcut
        n_in = width
    return [*shapes, (1000, n_in), (1000,)]


def resnet50(width: int = 64, n_classes: int = 1000) -> Shapes:
    """The parameters of ResNet-50: 161 tensors, 25,557,032 elements.

    Args:
        width: Channels of the first convolution; fewer make a smaller network of the same layers.
        n_classes: Outputs of the last layer.

    References:
        He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, table 1.
    """
    shapes, n_in = _conv_and_norm(3, width, 7), width
    for stage, n_blocks in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for block in range(n_blocks):
            shapes += _conv_and_norm(n_in, inner, 1) + _conv_and_norm(inner, inner, 3)
            shapes += _conv_and_norm(inner, 4 * inner, 1)
            if block == 0:
                shapes += _conv_and_norm(n_in, 4 * inner, 1)
            n_in = 4 * inner
    return [*shapes, (n_classes, n_in), (n_classes,)]


def _conv_and_norm(n_in: int, n_out: int, kernel: int) -> Shapes:
    return [(n_out, n_in, kernel, kernel), (n_out,), (n_out,)]


def vit(width: int = 768) -> Shapes:
    """The parameters of ViT-B/16: 152 tensors, 86,567,656 elements; with width 384 ViT-S/16's.

    References:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021, table 1.
    """
    n_patches = (224 // 16) ** 2
    shapes: Shapes = [(1, 1, width), (1, n_patches + 1, width), (width, 3, 16, 16), (width,)]
    block = [(width,), (width,), *_linear(width, 3 * width), *_linear(width, width)]
    block += [(width,), (width,), *_linear(width, 4 * width), *_linear(4 * width, width)]
    return [*shapes, *12 * block, (width,), (width,), *_linear(width, 1000)]


def convnext_tiny() -> Shapes:
    """The parameters of ConvNeXt-T: 182 tensors, 28,589,128 elements.

    References:
        Liu et al., *A ConvNet for the 2020s*, CVPR 2022, section 3.
    """
    shapes: Shapes = [(96, 3, 4, 4), (96,), (96,), (96,)]
    n_in = 96
    for width, n_blocks in zip((96, 192, 384, 768), (3, 3, 9, 3), strict=True):
        if width != n_in:
            shapes += [(n_in,), (n_in,), (width, n_in, 2, 2), (width,)]
        block: Shapes = [(width,), (width, 1, 7, 7), (width,), (width,), (width,)]
        shapes += n_blocks * (block + _linear(width, 4 * width) + _linear(4 * width, width))
        n_in = width
    return [*shapes, (n_in,), (n_in,), *_linear(n_in, 1000)]


def gpt2() -> Shapes:
    """The parameters of GPT-2 small: 148 tensors, 124,439,808 elements.

    References:
        Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019, table 2.
    """
    width = 768

    def linear(n_in: int, n_out: int) -> Shapes:
        return [(n_in, n_out), (n_out,)]  # GPT-2 stores its weights transposed

    block = [(width,), (width,), *linear(width, 3 * width), *linear(width, width)]
    block += [(width,), (width,), *linear(width, 4 * width), *linear(4 * width, width)]
    return [(50257, width), (1024, width), *12 * block, (width,), (width,)]


def _linear(n_in: int, n_out: int) -> Shapes:
    return [(n_out, n_in), (n_out,)]


def numel(shapes: Shapes) -> int:
    """Number of elements of all the tensors together."""
    return sum(math.prod(shape) for shape in shapes)
