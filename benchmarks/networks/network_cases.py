"""The networks that are measured, and their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.architectures import ARCHITECTURES

#: Keys of `ARCHITECTURES`.
NETWORKS = ("ResNet-50", "MobileNetV2", "DenseNet-121", "EfficientNet-B0")
CLASSES = 1000
SIZE = 224


def build(network: str, size: int = SIZE) -> nn.Module:
    """Build a network for images of a size; its weights are equal at every call."""
    return ARCHITECTURES[network].build(any_size=size != SIZE)


def batch_of(network: str, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw images and labels, equal at every call."""
    images = ARCHITECTURES[network].batch(batch, size=(size, size))
    return images, torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(1))


def roundings(images: Tensor, eps: float) -> list[Tensor]:
    """The images, and four copies with every value moved up or down by the relative amount eps.

    The spread of a network's results over them says how much right results may differ: in a deep network with gates
    and few values per channel, rounding errors grow, and other processors round differently.
    """
    generator = torch.Generator().manual_seed(2)
    signs = [2.0 * torch.randint(2, images.shape, generator=generator) - 1 for _ in range(4)]
    return [images, *(images * (1 + eps * each.to(images)) for each in signs)]
