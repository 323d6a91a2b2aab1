"""What tests of freezing share."""

import pytest
import torch
from control.models import KINDS, data

from keelnorm.control import freeze

every_kind = pytest.mark.parametrize(("rank", "kind"), KINDS, ids=[f"{kind}{rank}d" for rank, kind in KINDS])


def freeze_and_give(model):
    freeze(model)
    return model


def train(model, rank, steps, per_epoch=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for number in range(steps):
        if number % per_epoch == 0:
            model.train()
        optimizer.zero_grad()
        model(data(rank)).square().mean().backward()
        optimizer.step()
