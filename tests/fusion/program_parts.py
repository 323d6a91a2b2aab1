"""Functions and modules that random programs call, as people write them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 3
Pair = namedtuple("Pair", "first second")


class Straight(torch.autograd.Function):
    """Rounds, and hands the gradient on."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.5


class Saving(torch.autograd.Function):
    """Squares, from what it has saved of its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class Turning(torch.autograd.Function):
    """Looks at its argument, hands it on, and turns the gradient round."""

    @staticmethod
    def forward(ctx, x):
        ctx.least = float(x.min())
        return x

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Halving(torch.autograd.Function):
    """Changes its argument in place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(0.5)

    @staticmethod
    def backward(ctx, dy):
        return dy * 0.5


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = 1.0

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x) if self.beta != 1.0 else x * torch.sigmoid(x)


class HardSwish(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x * F.relu6(x + 3.0, inplace=self.inplace) / 6.0


class Branch(nn.Module):
    """A block of its own, with an answer in a dictionary."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
        self.calls = 0

    def forward(self, x, skip=None):
        self.calls += 1
        y = self.norm(self.conv(x))
        if skip is not None:
            y += skip
        return {"y": self.act(y), "calls": self.calls}


class Ends(nn.Module):
    """Ends with a batch norm, which whoever calls it fuses."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.features = None

    def forward(self, x):
        self.features = self.body(x)
        return self.features


NAMESPACE = {
    "torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint, "OrderedDict": OrderedDict, "Pair": Pair,
    "Swish": Swish, "HardSwish": HardSwish, "Branch": Branch, "Ends": Ends, "Straight": Straight,
    "Saving": Saving, "Halving": Halving, "Turning": Turning,
    "CHANNELS": CHANNELS, "copy": __import__("copy"),
}  # fmt: skip
