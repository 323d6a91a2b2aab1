"""The networks that whole steps are measured on: published architectures, as pytorchcv writes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Our names, and pytorchcv's.
NETWORKS = {
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_w1",
    "DenseNet-121": "densenet121",
    "EfficientNet-B0": "efficientnet_b0",
}
CLASSES = 1000
SIZE = 224


def build(network: str, size: int = SIZE) -> nn.Module:
    """The network with random weights, equal at every call; a key of `NETWORKS`.

    Dropout is off, so that two copies compute the same. For sizes other than 224 the final pooling,
    a window of 7x7, takes whatever is left of the image.
    """
    from pytorchcv.model_provider import get_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = get_model(NETWORKS[network])
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    features = made.get_submodule("features")
    if size != SIZE and isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
        features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
    return made


def batch_of(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and labels, equal at every call."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (batch,), generator=generator)


def roundings(images: Tensor, eps: float) -> list[Tensor]:
    """The images, and four times the images with every value up or down by the share eps of itself.

    What a network gives for them differs as much as right results may: in a deep one with gates and few values a
    channel, roundings grow, and another processor's are others.
    """
    generator = torch.Generator().manual_seed(2)
    signs = [2.0 * torch.randint(2, images.shape, generator=generator) - 1 for _ in range(4)]
    return [images, *(images * (1 + eps * each.to(images)) for each in signs)]
