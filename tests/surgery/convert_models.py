"""Small models for convert: some whose layers fuse, some whose layers do not, and some hard cases."""

from __future__ import annotations

import operator
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class OneLayer(nn.Module):
    """A convolution, a batch norm, and a function of the output and the input."""

    def __init__(self, then, layer=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3) if layer is None else layer
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.bn(self.conv(x)), x)


#: What follows the batch norm, and what then runs with it.
FORMS = {
    "F.relu": (lambda y, x: F.relu(y), "relu"),
    "F.relu in place": (lambda y, x: F.relu(y, inplace=True), "relu"),
    "F.relu in place by position": (lambda y, x: F.relu(y, True), "relu"),
    "torch.relu": (lambda y, x: torch.relu(y), "relu"),
    "method relu": (lambda y, x: y.relu(), "relu"),
    "method relu_": (lambda y, x: y.relu_(), "relu"),
    "F.relu6": (lambda y, x: F.relu6(y), "relu6"),
    "F.leaky_relu": (lambda y, x: F.leaky_relu(y, 0.2), "leaky_relu"),
    "F.leaky_relu by name": (lambda y, x: F.leaky_relu(y, negative_slope=0.3, inplace=True), "leaky_relu"),
    "F.elu": (lambda y, x: F.elu(y, 0.7), "elu"),
    "F.silu": (lambda y, x: F.silu(y), "silu"),
    "swish": (lambda y, x: y * torch.sigmoid(y), "silu"),
    "swish the other way": (lambda y, x: y.sigmoid() * y, "silu"),
    "F.gelu": (lambda y, x: F.gelu(y), "gelu"),
    "F.gelu tanh": (lambda y, x: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "F.hardswish": (lambda y, x: F.hardswish(y), "hardswish"),
    "F.hardsigmoid": (lambda y, x: F.hardsigmoid(y), "hardsigmoid"),
    "torch.sigmoid": (lambda y, x: torch.sigmoid(y), "sigmoid"),
    "method tanh": (lambda y, x: y.tanh(), "tanh"),
    "F.mish": (lambda y, x: F.mish(y), "mish"),
    "F.softplus": (lambda y, x: F.softplus(y, 2.0, 15.0), "softplus"),
    "a gate for another": (lambda y, x: x * torch.sigmoid(y), "sigmoid"),
    "+": (lambda y, x: y + x, "addition"),
    "+, relu": (lambda y, x: F.relu(y + x), "addition and relu"),
    "the other way": (lambda y, x: F.relu(x + y), "addition and relu"),
    "+=": (lambda y, x: operator.iadd(y, x).relu(), "addition and relu"),
    "torch.add": (lambda y, x: torch.add(y, x).relu_(), "addition and relu"),
    "method add": (lambda y, x: F.silu(y.add(x)), "addition"),
    "method add_": (lambda y, x: F.gelu(y.add_(x)), "addition"),
    "+ something": (lambda y, x: F.relu(y + x.abs()), "addition and relu"),
}
#: What stays as it is, and the beginning of the reason.
UNFUSED = {
    "nothing": (lambda y, x: y, "its result leaves the model"),
    "read twice": (lambda y, x: F.relu(y) + y.mean(), "mean reads its result"),
    "multiplied": (lambda y, x: F.relu(y * x), "mul reads its result"),
    "torch.add with alpha": (lambda y, x: torch.add(y, x, alpha=2.0), "add reads its result"),
    "added to itself": (lambda y, x: y + y, "add reads its result"),
    "a number added": (lambda y, x: F.relu(y + 1), "add reads its result"),
    "one value a channel added": (lambda y, x: F.relu(y + x.mean((2, 3), keepdim=True)), "add reads its result"),
    "another dtype added": (lambda y, x: F.relu(y + (x > 0)), "add reads its result"),
    "an unknown activation": (lambda y, x: F.celu(y), "celu reads its result"),
    "transposed in between": (lambda y, x: F.relu(y.transpose(2, 3)), "transpose reads its result"),
}


class Swish(nn.Module):
    """A user's own activation."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class HardSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3.0, inplace=True) / 6.0


class NotSwish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.001 * x)


class Block(nn.Module):
    """A residual block in which both batch norms before the addition are the last layers of a Sequential."""

    def __init__(self, channels=4, down=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if down else None
        self.act = nn.ReLU()

    def forward(self, x, scale=None):
        identity = x if self.down is None else self.down(x)
        out = self.body(x)
        out += identity
        if scale is not None:
            out = out * scale
        return self.act(out)


def a_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block(down=True), nn.Flatten())


class _Hard(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.count, self.seen = nn.BatchNorm2d(3), 0, []


class ByShape(_Hard):
    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) if x.shape[0] > 2 else F.gelu(y)


class ByType(_Hard):
    def forward(self, x):
        return F.relu(self.bn(x)) if isinstance(x, Tensor) else x


class Random(_Hard):
    def forward(self, x):
        return F.relu(self.bn(x)) if random.random() < 2 else x


class TorchRandom(_Hard):
    def forward(self, x):
        return F.relu(self.bn(x)) if torch.rand(()) < 2 else x


class Counting(_Hard):
    def forward(self, x):
        self.count += 1
        return F.relu(self.bn(x))


class Collecting(_Hard):
    def forward(self, x):
        self.seen.append(None)
        return F.relu(self.bn(x))


class Tensors(_Hard):
    def forward(self, x):
        return F.relu(self.bn(x)) + torch.ones(3, 1, 1)


class WithoutGradients(_Hard):
    def forward(self, x):
        with torch.no_grad():
            y = self.bn(x)
        return F.relu(y) + x


class ByGradients(_Hard):
    def forward(self, x):
        return F.relu(self.bn(x)) if torch.is_grad_enabled() else F.gelu(self.bn(x))


class Autocast(_Hard):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.bn(x))


class Checkpointing(_Hard):
    def forward(self, x):
        return checkpoint(lambda x: F.relu(self.bn(x)), x, use_reentrant=False)


class Checked(nn.Module):
    """A model that checks its input first."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        if x.shape[1] != 3:
            raise KeyError(f"{x.shape[1]} channels")
        assert x.dim() == 4, "four dimensions"
        return F.relu(self.bn(x))


class AnyNumber(_Hard):
    def forward(self, *xs):
        return F.relu(self.bn(xs[0]))


#: Classes whose forward does something else the next time, or something that a recording would lose; and how many
#: kernels are fused in a call with gradients.
HARD = {
    ByShape: 1,
    ByType: 1,
    Random: 1,
    TorchRandom: 1,
    Counting: 1,
    Collecting: 1,
    Tensors: 1,
    WithoutGradients: 0,
    ByGradients: 1,
    Autocast: 1,
    Checkpointing: 0,
    AnyNumber: 1,
}
