"""The activation that the recipe added: by name, as a module, and fused in a converted model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.call import all_sizes_wait


def test_it_works() -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    ours, theirs = kn.BatchNorm2d(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
    for activation in ("softsign", nn.Softsign()):
        torch.testing.assert_close(ours(x, activation=activation), F.softsign(theirs(x)))
    torch.autograd.gradcheck(lambda x: ours(x, activation="softsign"), (x,))
    torch.autograd.gradgradcheck(lambda x: ours(x, activation="softsign"), (x,))
    model, _ = kn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.Softsign()).double())
    before = pending.completed
    with all_sizes_wait():
        for _ in range(2):  # the first call learns
            model(x)
    assert pending.completed == before + 1
