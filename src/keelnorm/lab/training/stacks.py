"""The networks of the laboratory: stacks that train many replicas at the cost of few.

A stack of R replicas is one network that trains R independent ones: weights carry a leading axis R and go through one
`torch.bmm` (or one grouped convolution), and a normalization over R*C channels is R normalizations over C. On small
networks a step then costs little more than that of one replica, because the time of a call is mostly overhead.

Every parameter of a stack has a first dimension that is R times something, replica after replica, so
`parameter.view(R, -1)` is a replica a row. All replicas share the draw of their initial weights, and so do all arms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keelnorm as kn
from keelnorm.lab.training.arms import Arm

Initialization = Literal["he", "xavier", "torch"]
Place = Literal["before", "after", "input"]
"""Where a hidden layer normalizes: before its activation, after it, or its input."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def draw_weight(shape: tuple[int, ...], initialization: Initialization, generator: torch.Generator) -> Tensor:
    """One layer's weight: He's normal, Glorot's uniform, or what `torch.nn.Linear` and `Conv2d` start from."""
    fan_in = math.prod(shape[1:])
    if initialization == "he":
        return torch.randn(shape, generator=generator) * math.sqrt(2.0 / fan_in)
    uniform = torch.rand(shape, generator=generator) * 2.0 - 1.0
    if initialization == "xavier":
        return uniform * math.sqrt(6.0 / (fan_in + shape[0] * math.prod(shape[2:])))
    return uniform / math.sqrt(fan_in)


def draw_bias(shape: tuple[int, ...], initialization: Initialization, generator: torch.Generator) -> Tensor:
    """One layer's bias: uniform as in `torch.nn` with its weights, zero otherwise."""
    draw = (torch.rand(shape[0], generator=generator) * 2.0 - 1.0) / math.sqrt(math.prod(shape[1:]))
    return draw if initialization == "torch" else torch.zeros(shape[0])


def _stacked(draw: Tensor, scales: Tensor) -> nn.Parameter:
    """(out, ...) -> (R * out, ...): the draw, times each replica's scale."""
    return nn.Parameter((scales.view(-1, *[1] * draw.dim()) * draw).flatten(0, 1))


class Stack(nn.Module):
    """R replicas of a network as one module; see `StackedMLP` and `StackedCNN`.

    `blocks` are the hidden layers' normalization and activation, in order: hooks on them see what the layers
    receive, as (n, R * C, ...). A block is an `kn.Sequential`, so batch norm and activation run as one kernel.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        arm: Arm,
        scales: Tensor,
        generator: torch.Generator,
        initialization: Initialization,
        activation: str,
        place: Place,
        dropout: float,
    ) -> None:
        super().__init__()
        self.arm, self.place, self.dropout = arm, place, dropout
        self.replicas = len(scales)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.blocks = nn.ModuleList()
        self.inputs = nn.ModuleList()
        # A bias ahead of a batch norm has no effect: its mean takes it away.
        without_bias = place == "before" and arm.name != "none"
        for index, shape in enumerate(shapes):
            weight = draw_weight(shape, initialization, generator)
            bias = draw_bias(shape, initialization, generator)  # drawn where it isn't used too: all arms share draws
            last = index == len(shapes) - 1
            self.weights.append(_stacked(weight, scales))
            self.biases.append(_stacked(bias, scales) if last or not without_bias else None)
            spatial = len(shape) - 2
            if place == "input":
                self.inputs.append(arm.layer(spatial, shape[1], self.replicas))
            if not last:
                self.blocks.append(self._block(ACTIVATIONS[activation](), spatial, shape[0]))

    def _block(self, activation: nn.Module, spatial: int, channels: int) -> nn.Module:
        if self.place == "input" or self.arm.normalization is None:
            return kn.Sequential(activation)
        layer = self.arm.layer(spatial, channels, self.replicas)
        return kn.Sequential(*((layer, activation) if self.place == "before" else (activation, layer)))

    def hidden(self, layer: int, z: Tensor) -> Tensor:
        """The normalization and activation of hidden layer `layer`, and dropout where the stack has it."""
        y: Tensor = self.blocks[layer](z)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def linear(self, layer: int, x: Tensor) -> Tensor:
        """(R, n, in) -> (R, n, out)."""
        weight = self.weights[layer].view(self.replicas, -1, x.shape[2]).transpose(1, 2)
        bias = self.biases[layer]
        if bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(bias.view(self.replicas, 1, -1), x, weight)


class StackedMLP(Stack):
    """Fully connected networks: (n, ...) -> logits (R, n, classes).

    Args:
        features: values of a sample.
        widths: of the hidden layers.
        classes: outputs.
        arm: how hidden layers normalize.
        generator: draws weights and biases, the same for all replicas.
        scales: (R,), by which each replica's initial weights are multiplied.
        initialization, activation: by name.
        place: where the normalization stands.
        dropout: the share of hidden values dropped in training.
    """

    def __init__(
        self,
        features: int,
        widths: Sequence[int],
        classes: int,
        arm: Arm,
        generator: torch.Generator,
        scales: Tensor | None = None,
        *,
        initialization: Initialization = "he",
        activation: str = "relu",
        place: Place = "before",
        dropout: float = 0.0,
    ) -> None:
        sizes = [features, *widths, classes]
        shapes = [(out, into) for into, out in pairwise(sizes)]
        scales = torch.ones(1) if scales is None else scales
        super().__init__(shapes, arm, scales, generator, initialization, activation, place, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every replica."""
        h = x.flatten(1).expand(self.replicas, -1, -1)
        for layer in range(len(self.weights)):
            if self.place == "input":
                h = _apart(self.inputs[layer](_together(h)), self.replicas)
            z = self.linear(layer, h)
            if layer == len(self.blocks):
                return z
            h = _apart(self.hidden(layer, _together(z)), self.replicas)
        return h


class StackedCNN(Stack):
    """3 x 3 convolutions and a linear layer: (n, C, H, W) -> logits (R, n, classes).

    `channels` and `strides` are those of the convolutions; with `pool` each channel's mean over positions goes into the
    linear layer, otherwise all positions, of an image of `side` x `side`. The other arguments are those of
    `StackedMLP`.
    """

    def __init__(
        self,
        into: int,
        side: int,
        channels: Sequence[int],
        strides: Sequence[int],
        classes: int,
        arm: Arm,
        generator: torch.Generator,
        scales: Tensor | None = None,
        *,
        pool: bool = False,
        initialization: Initialization = "he",
        activation: str = "relu",
        place: Place = "before",
        dropout: float = 0.0,
    ) -> None:
        self.strides, self.pool = tuple(strides), pool
        for stride in strides:
            side = (side - 1) // stride + 1
        sizes = [into, *channels]
        shapes: list[tuple[int, ...]] = [(out, c, 3, 3) for c, out in pairwise(sizes)]
        shapes.append((classes, sizes[-1] * (1 if pool else side * side)))
        scales = torch.ones(1) if scales is None else scales
        if place == "input":
            raise ValueError('StackedCNN: place is "before" or "after"')
        super().__init__(shapes, arm, scales, generator, initialization, activation, place, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every replica."""
        for layer, stride in enumerate(self.strides):
            # The first layer's input is the same for all replicas: one group reads it.
            groups = self.replicas if layer else 1
            weight, bias = self.weights[layer], self.biases[layer]
            x = self.hidden(layer, F.conv2d(x, weight, bias, stride=stride, padding=1, groups=groups))
        features = x.mean(dim=(2, 3)) if self.pool else x
        return self.linear(len(self.strides), _apart(features.flatten(1), self.replicas))


def _together(x: Tensor) -> Tensor:
    """(R, n, C) -> (n, R * C), as a normalization takes it."""
    return x.transpose(0, 1).flatten(1)


def _apart(x: Tensor, replicas: int) -> Tensor:
    """(n, R * C) -> (R, n, C)."""
    return x.view(len(x), replicas, -1).transpose(0, 1)
