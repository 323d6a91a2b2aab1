"""The layer that the recipe added works with the operations on models."""

from __future__ import annotations

import torch
from torch import nn

import keelnorm as kn


def test_it_works() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kn.FloorBatchNorm(4), nn.ReLU())
    x = torch.randn(8, 3, 5, 5)
    model, _ = kn.recalibrate(model, [x])
    model.eval()
    before = model(x)
    folded, report = kn.fold(model, x)
    assert report.summary["folded"] == 1, report
    torch.testing.assert_close(folded(x), before)
