"""A healthy model gets a finding of warning or worse with a probability of at most 5 %, over all rules and layers.

The models are healthy by construction: their running statistics are averages over batches drawn from the same
distribution as the data that the doctor sees.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from scipy import stats
from torch import nn

import keelnorm as kn
from keelnorm.doctor.rules import drifted_statistics
from keelnorm.doctor.rules._drift import drift_of

#: Diagnoses of each kind.
NUMBER = 60


def images(generator, *, size, batches):
    x = torch.randn(batches, size, 3, 8, 8, generator=generator)
    return list(x * 0.5 + torch.randn(batches, size, 3, 1, 1, generator=generator))


def convolutional(generator):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    return model, lambda size, batches: images(generator, size=size, batches=batches)


def dense(generator):
    """Inputs with heavy tails, and skewed."""
    model = nn.Sequential(
        nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 4),
    )  # fmt: skip

    def draw(size, batches):
        return list(torch.randn(batches, size, 10, generator=generator).mul(0.5).exp())

    return model, draw


def recurrent(generator):
    """One layer for three steps of the same distribution, and one value in two that is 0."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.out = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(sum(torch.relu(self.norm(self.linear(step))) for step in x.unbind(1)))

    def draw(size, batches):
        return list(torch.randn(batches, size, 3, 6, generator=generator).relu())

    return Model(), draw


@pytest.fixture(autouse=True)
def _one_thread():
    """So small tensors gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("make", [pytest.param(convolutional, marks=pytest.mark.slow), dense, recurrent])
def test_healthy_models(make, labelled):
    false = 0
    for seed in range(NUMBER):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model, draw = make(generator)
        size = (16, 32, 64)[seed % 3]
        with torch.no_grad():
            for batch in draw(size, 60):
                model(batch)
        batches = draw(size, 2 + seed % 5)
        if labelled:
            batches = [(batch, torch.randint(3, (len(batch),))) for batch in batches]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = nn.CrossEntropyLoss() if labelled else lambda model, batch: model(batch).square().mean()
        diagnosis = kn.diagnose(model.train(seed % 2 == 0), batches, loss=loss, optimizer=optimizer)
        assert set(diagnosis.skipped) == set()
        false += bool(diagnosis.at_least("warning"))
    # A test at 0.1 % of whether the probability is above 5 %.
    assert false <= stats.binom.ppf(0.999, NUMBER, 0.05), f"{false} of {NUMBER}"


def test_the_simulation_would_see_a_rule_that_speaks_too_often(monkeypatch):
    monkeypatch.setattr(import_module("keelnorm.doctor.diagnose"), "corrected", lambda findings, tests: findings)

    def all_of_them(evidence, layers):
        return [(layer, found) for layer in layers if (found := drift_of(evidence, layer)) is not None]

    monkeypatch.setattr(drifted_statistics, "drifted", all_of_them)
    monkeypatch.setattr(drifted_statistics, "_severity", lambda evidence, layer: "warning")
    with pytest.raises(AssertionError, match=f"of {NUMBER}"):
        test_healthy_models(dense, False)
