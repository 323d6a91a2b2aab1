"""Models for the command's tests: copied to the current directory as `ailing`."""

import torch
from torch import nn


def sick(momentum=0.99):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, first, second):
        print("in the forward")
        return self.norm(self.linear(first)) + second


def batches():
    return list(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(4))


def plain():
    return nn.Linear(3, 3)


def labelled():
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches()]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


NOTHING = None
