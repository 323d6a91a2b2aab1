"""The networks of the laboratory, alone and stacked.

A stack of R replicas is one network that trains R independent ones: weights carry a leading axis R and
go through one `torch.bmm` (or one grouped convolution), and a normalization over R*C channels is R
normalizations over C. On small networks a step then costs little more than that of one replica,
because the time of a call is mostly overhead.

Every parameter of a stack has a first dimension that is R times something, replica after replica, so
`parameter.view(R, -1)` is a replica a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.lab.arms import Arm

MLP_WIDTHS = (100, 100, 100)
CNN_CHANNELS = (8, 16, 16)
CNN_STRIDES = (1, 2, 1)
SIDE = 8
CLASSES = 10


Initialization = Literal["he", "torch"]


def draw_weight(shape: tuple[int, ...], initialization: Initialization, generator: torch.Generator) -> Tensor:
    """One layer's weight: He's normal, or what `torch.nn.Linear` and `Conv2d` start from."""
    fan_in = math.prod(shape[1:])
    if initialization == "he":
        return torch.randn(shape, generator=generator) * math.sqrt(2.0 / fan_in)
    return (torch.rand(shape, generator=generator) * 2.0 - 1.0) / math.sqrt(fan_in)


def draw_bias(shape: tuple[int, ...], initialization: Initialization, generator: torch.Generator) -> Tensor:
    """One layer's bias: zero with He's weights, uniform as in `torch.nn` otherwise."""
    draw = (torch.rand(shape[0], generator=generator) * 2.0 - 1.0) / math.sqrt(math.prod(shape[1:]))
    return torch.zeros(shape[0]) if initialization == "he" else draw


class Stack(nn.Module):
    """R replicas of a network as one module.

    `scales` multiply the initial weights, a replica each. `blocks` are the hidden layers' normalization
    and activation, in order: hooks on them see what the layers receive.
    """

    blocks: nn.ModuleList

    def __init__(
        self,
        arm: Arm,
        scales: Tensor,
        generator: torch.Generator,
        initialization: Initialization = "he",
    ) -> None:
        super().__init__()
        self.arm = arm
        self.replicas = len(scales)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.blocks = nn.ModuleList()
        for shape, spatial in self.shapes():
            # All replicas share the draws, and so do all arms: the bias is drawn where it isn't used.
            weight = draw_weight(shape, initialization, generator)
            bias = draw_bias(shape, initialization, generator)
            self.weights.append(_stacked(weight, scales))
            if spatial is None or arm.normalization is None:
                self.biases.append(_stacked(bias, scales))
            if spatial is not None:
                self.blocks.append(arm.block(spatial, self.replicas * shape[0], nn.ReLU()))

    def shapes(self) -> Iterator[tuple[tuple[int, ...], int | None]]:
        """Each layer's weight shape, and its position axes (None: the output layer)."""
        raise NotImplementedError

    def _bias(self, layer: int) -> Tensor | None:
        if self.arm.normalization is None:
            bias: Tensor = self.biases[layer]
            return bias
        return self.biases[0] if layer == len(self.blocks) else None

    def _linear(self, layer: int, x: Tensor) -> Tensor:
        """(R, in, n) -> (R, out, n)."""
        weight = self.weights[layer].view(self.replicas, -1, x.shape[1])
        bias = self._bias(layer)
        if bias is None:
            return torch.bmm(weight, x)
        return torch.baddbmm(bias.view(self.replicas, -1, 1), weight, x)


class StackedMLP(Stack):
    """Fully connected layers with ReLU: images (n, C, H, W) -> logits (R, classes, n).

    Activations are (R, H, n), seen by the normalization as (1, R*H, n): the samples lie along the
    last axis, so that no step needs a transposition.
    """

    def shapes(self) -> Iterator[tuple[tuple[int, ...], int | None]]:
        features = SIDE * SIDE
        for width in MLP_WIDTHS:
            yield (width, features), 1
            features = width
        yield (CLASSES, features), None

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1).t().expand(self.replicas, -1, -1)
        for layer, block in enumerate(self.blocks):
            z = self._linear(layer, x)
            x = block(z.view(1, -1, z.shape[2])).view_as(z)
        return self._linear(len(self.blocks), x)


class StackedCNN(Stack):
    """Three 3 x 3 convolutions with ReLU and a linear layer: (n, 1, 8, 8) -> (R, classes, n)."""

    def shapes(self) -> Iterator[tuple[tuple[int, ...], int | None]]:
        channels = 1
        for out in CNN_CHANNELS:
            yield (out, channels, 3, 3), 2
            channels = out
        side = SIDE // math.prod(CNN_STRIDES)
        yield (CLASSES, channels * side * side), None

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer, (block, stride) in enumerate(zip(self.blocks, CNN_STRIDES, strict=True)):
            # The first layer's input is the same for all replicas: one group reads it.
            groups = self.replicas if layer else 1
            weight, bias = self.weights[layer], self._bias(layer)
            x = block(F.conv2d(x, weight, bias, stride=stride, padding=1, groups=groups))
        features = x.reshape(len(images), self.replicas, -1).permute(1, 2, 0)
        return self._linear(len(self.blocks), features)


STACKS: dict[str, type[Stack]] = {"mlp": StackedMLP, "cnn": StackedCNN}
LABELS = {"mlp": "fully connected", "cnn": "convolutional"}


def _stacked(draw: Tensor, scales: Tensor) -> nn.Parameter:
    """(out, ...) -> (R * out, ...): the draw, times each replica's scale."""
    return nn.Parameter((scales.view(-1, *[1] * draw.dim()) * draw).flatten(0, 1))


def stack(
    network: str,
    arm: Arm,
    scales: Tensor,
    generator: torch.Generator,
    initialization: Initialization = "he",
) -> Stack:
    """A stack of `network` ("mlp" or "cnn"), one replica for each initialization scale."""
    try:
        kind = STACKS[network]
    except KeyError:
        raise KeyError(f"no network is named {network!r}; there are {', '.join(STACKS)}") from None
    return kind(arm, scales, generator, initialization)


def mlp(arm: Arm, widths: tuple[int, ...] = MLP_WIDTHS) -> nn.Sequential:
    """The fully connected network as a user would write it: (n, 1, 8, 8) -> (n, 10)."""
    modules: list[nn.Module] = [nn.Flatten()]
    features = SIDE * SIDE
    for width in widths:
        modules.append(nn.Linear(features, width, bias=arm.normalization is None))
        modules.extend(arm.block(1, width, nn.ReLU()))
        features = width
    return arm.sequential(*modules, nn.Linear(features, CLASSES))


def cnn(arm: Arm, channels: tuple[int, ...] = CNN_CHANNELS) -> nn.Sequential:
    """The convolutional network as a user would write it: (n, 1, 8, 8) -> (n, 10)."""
    modules: list[nn.Module] = []
    previous = 1
    for out, stride in zip(channels, CNN_STRIDES, strict=True):
        bias = arm.normalization is None
        modules.append(nn.Conv2d(previous, out, 3, stride=stride, padding=1, bias=bias))
        modules.extend(arm.block(2, out, nn.ReLU()))
        previous = out
    side = SIDE // math.prod(CNN_STRIDES)
    return arm.sequential(*modules, nn.Flatten(), nn.Linear(previous * side * side, CLASSES))
