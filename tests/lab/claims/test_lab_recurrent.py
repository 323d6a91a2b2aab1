"""The claim about recurrent networks: what is read, a training that breaks, and verdicts on made-up results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from keelnorm.lab.claims import _recurrent_training, recurrent
from keelnorm.lab.claims._recurrent_training import Reader, sequences
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.core.threads import one_thread
from keelnorm.lab.reading.verdicts import verdict

FULL = Plan(quick=False, seeds=3)


@pytest.fixture(autouse=True)
def _as_cells_run():
    with one_thread():
        yield


def test_a_margin_is_around_the_image_and_never_varies():
    (plain, labels), (framed, same) = (sequences(task, "digits", 3).test for task in ("pixels", "margin"))
    assert plain.shape == (300, 64, 1)
    assert framed.shape == (300, 100, 1)
    assert torch.equal(labels, same)
    image = framed.view(300, 10, 10)
    assert torch.equal(image[:, 1:-1, 1:-1], plain.view(300, 8, 8))
    image[:, 1:-1, 1:-1] = 0
    assert not image.any()


def test_rows_are_the_image_row_by_row_and_text_the_next_character():
    rows, _ = sequences("rows", "digits", 0).test
    assert rows.shape == (300, 8, 8)
    assert torch.equal(rows.flatten(1).unsqueeze(2), sequences("pixels", "digits", 0).test[0])
    windows, following = sequences("text", "text", 0).test
    assert torch.equal(windows.argmax(2)[:, 1:], following[:, :-1])


class Bursting(nn.Module):
    """A network whose gradient is infinite from the third forward in training on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))
        self.forwards = 0

    def forward(self, x):
        self.forwards += torch.is_grad_enabled()  # a step of the training
        slope = math.inf if self.forwards >= 3 else 1.0
        logits = self.weight * slope if slope == 1.0 else Infinite.apply(self.weight)
        return logits.expand(x.shape[0], x.shape[1], 10)


class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.inf)


def test_a_gradient_that_is_not_finite_ends_the_training_and_is_told():
    network = Bursting()
    found = _recurrent_training._fit(network, sequences("rows", "digits", 0), 0.01, 10)
    assert found["broken"] == 3
    assert network.forwards == 3
    assert network.weight.isfinite().all()
    assert found["steps"] == [2, 4, 6, 8, 10]
    assert found["test"][1:] == [found["test"][-1]] * 4
    assert math.isfinite(found["gradient"])


def test_all_arms_start_from_the_same_weights_where_they_have_the_same():
    states = []
    for arm in ("bn", "eps", "noise"):
        torch.manual_seed(0)
        states.append(Reader(arm, 1, 4, 3, 10).state_dict())
    for other in states[1:]:
        assert all(torch.equal(other[name], value) for name, value in states[0].items())


def made_up(rows=2.0, text=0.3, pixels=2.0, margin=-30.0, noise=60.0):
    """Results in which the batch-normalized LSTM is that much better, and initial noise adds as much to it."""
    gains = {"rows": rows, "text": text, "pixels": pixels, "margin": margin}
    by_key = {}
    for cell in recurrent.CLAIM.cells(FULL):
        axes = cell.axes
        better = gains[axes["task"]] if axes["arm"] != "lstm" else 0.0
        better += noise if axes["arm"] == "noise" else 0.0
        jitter = 0.01 * axes["seed"] * (axes["arm"] != "lstm")
        value = 3.0 - better - jitter if axes["task"] == "text" else 50.0 + better + jitter
        curve = [value] * 5
        broken = 7 if axes["task"] == "margin" and axes["arm"] == "bn" else 0
        by_key[cell.key] = {
            "steps": [1, 2, 3, 4, 5], "validation": curve, "test": curve, "test_batch": curve, "gradient": 2.0,
            "broken": broken,
        }  # fmt: skip
    return recurrent.read(FULL, Results(by_key))


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({}, "depends"),
        ({"margin": 5.0}, "holds"),
        ({"rows": -1.0, "text": -0.1, "pixels": -2.0}, "does not hold"),
    ],
)
def test_the_verdict_follows_every_task(gains, expected):
    assert verdict(made_up(**gains).findings) == expected


def test_what_noise_repairs_stands_beside_and_what_broke_in_the_table():
    reading = made_up()
    (remedy,) = (f for f in reading.findings if "initial noise" in f.quantity and f.quantity.startswith("the remedy"))
    assert remedy.effect.value == pytest.approx(60.0)
    assert not remedy.decisive
    assert remedy.where == "pixel by pixel with a margin, digits"
    assert "80.0 % with initial noise" in reading.answer
    broken = {(row[0], row[1]): row[-1] for row in reading.tables[0].rows}
    assert broken["pixel by pixel with a margin, digits", "batch-normalized LSTM"] == "3 of 3"
    assert broken["pixel by pixel, digits", "batch-normalized LSTM"] == "0 of 3"
