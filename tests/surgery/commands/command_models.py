"""Models for the commands' tests: copied to the current directory as `nets`."""

import torch
from torch import nn

print("a module that prints")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


def small(classes=4):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)]
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(6), *head)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear, self.bn = nn.Embedding(2, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, first, ids):
        return self.bn(self.linear(first)) + self.table(ids)


def fails():
    raise KeyError("no such size")


def batches():
    return (torch.full((2, 3), float(i)) for i in range(3))


def one_tensor():
    return torch.zeros(3)


linear = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
answer = 42
