"""Small versions of the models that the benchmarks train, of torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ON_CPU", "ON_GPU", "TASKS", "ResNet", "Task", "ViT"]


class ResNet(nn.Module):
    """A ResNet of basic blocks or bottlenecks.

    Args:
        n_blocks: Number of blocks in each stage.
        width: Channels of the first stage.
        n_classes: Number of outputs.
        bottleneck: Whether a block is a bottleneck, as in ResNet-50.

    References:
        He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016.
    """

    def __init__(
        self, n_blocks: tuple[int, ...], width: int, n_classes: int, bottleneck: bool
    ) -> None:
        super().__init__()
        stem = [*_conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)] if bottleneck else _conv(3, width, 3)
        layers, n_in = [*stem], width
        for stage, n in enumerate(n_blocks):
            inner = width * 2**stage
            for block in range(n):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(n_in, inner, stride, bottleneck))
                n_in = 4 * inner if bottleneck else inner
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)]
        self.layers = nn.Sequential(*layers, *head)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        return self.layers(images)


def _conv(n_in: int, n_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(n_out), nn.ReLU()]


class _Block(nn.Module):
    def __init__(self, n_in: int, inner: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        n_out = 4 * inner if bottleneck else inner
        layers = (
            [*_conv(n_in, inner, 1), *_conv(inner, inner, 3, stride), *_conv(inner, n_out, 1)]
            if bottleneck
            else [*_conv(n_in, inner, 3, stride), *_conv(inner, inner, 3)]
        )
        self.layers = nn.Sequential(*layers[:-1])  # the last ReLU follows the sum
        same = n_in == n_out and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_conv(n_in, n_out, 1, stride)[:-1])
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.layers(features) + self.shortcut(features))


class ViT(nn.Module):
    """ViT-S/16 for 224 x 224 images.

    References:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021.
    """

    def __init__(self, width: int = 384, n_layers: int = 12, n_heads: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (224 // 16) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.norm(self.layers(tokens + self.positions)[:, 0]))


def _mlp() -> nn.Module:
    layers = [nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*layers)


def _resnet20() -> nn.Module:
    return ResNet((3, 3, 3), 16, 10, bottleneck=False)


def _resnet50() -> nn.Module:
    return ResNet((3, 4, 6, 3), 64, 1000, bottleneck=True)


@dataclass(frozen=True)
class Task:
    """What to train.

    Attributes:
        make: Makes the model.
        batch: Batch size.
        shape: Shape of an input.
        n_classes: Number of classes.
        lr: An LR at which training without momentum is seen in the first losses.
    """

    make: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    n_classes: int
    lr: float = 0.02


TASKS: dict[str, Task] = {
    "MLP, batch 128": Task(_mlp, 128, (64,), 10, lr=1.0),
    "ResNet-20 for CIFAR, batch 32": Task(_resnet20, 32, (3, 32, 32), 10),
    "ResNet-20 for CIFAR, batch 128": Task(_resnet20, 128, (3, 32, 32), 10),
    "ResNet-50, batch 64": Task(_resnet50, 64, (3, 224, 224), 1000),
    "ViT-S/16, batch 64": Task(ViT, 64, (3, 224, 224), 1000),
}
ON_CPU = ("MLP, batch 128", "ResNet-20 for CIFAR, batch 32")
ON_GPU = tuple(name for name in TASKS if name != "ResNet-20 for CIFAR, batch 32")
