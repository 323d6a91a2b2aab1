"""A network to follow, data, and a training loop."""

from __future__ import annotations

import torch
from torch import nn


def network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2),
    )  # fmt: skip


def data(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, 16, 3, 8, 8, generator=generator))


def train(model, steps=6, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    losses = []
    for x in data(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
