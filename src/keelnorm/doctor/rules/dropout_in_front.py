"""KN112: a dropout stands in front of a batch norm, so that evaluation sees another variance than training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.neighbors import Dropped
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule

#: At this rate the accuracy of all networks of the source falls by far more than dropout gives.
HARMFUL = 0.5


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each batch norm with a dropout in front, which at most one convolution or linear layer is between."""
    for layer in evidence.layers:
        if layer.beside is None or not layer.beside.dropouts or layer.held or layer.fixed:
            continue
        worst = max(layer.beside.dropouts, key=lambda one: one.rate)
        shift = 1 / (1 - worst.rate)
        yield RULE.found(
            (layer.path,),
            f"{worst.name} with rate {worst.rate:g} stands in front of {layer.named}: dropped values have at least "
            f"{shift:.3g} times the variance that evaluation sees.",
            [*map(_without, layer.beside.dropouts), "# drop after the last batch norm instead"],
            severity="warning" if worst.rate >= HARMFUL else "info",
            evidence={"rate": worst.rate, "variance ratio": shift, "threshold": HARMFUL, "dropout": worst.name},
        )


def _without(dropout: Dropped) -> str:
    """Code that takes a dropout out."""
    if dropout.attribute is not None:
        owner = f"model.get_submodule({dropout.path!r})" if dropout.path else "model"
        return f"{owner}.{dropout.attribute} = 0.0"
    if not dropout.is_layer:
        return f"# {dropout.name} is to be taken out of its forward"
    return f"model.set_submodule({dropout.path!r}, nn.Identity())"


def _right_before() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.ReLU()), ("3",))


def _before_a_convolution() -> Case:
    model = nn.Sequential(nn.Dropout2d(0.3), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return Case(model, ("2",), batches=[torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))])


class _Block(nn.Module):
    """A residual block with a dropout in the middle, as in wide residual networks."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout, self.conv = dropout, nn.Conv1d(3, 3, 1, bias=False)
        self.first, self.second, self.last = (nn.BatchNorm1d(3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.dropout(self.first(x).relu())
        return self.last(self.second(self.conv(y)).relu()) + x


def _inside_a_block() -> Case:
    return Case(_Block(nn.Dropout(0.6)), ("second",), batches=[torch.zeros(2, 3, 4)])


class _DenseLayer(nn.Module):
    """A layer that calls the function, as published dense networks do."""

    def __init__(self, rate: float, *, always: bool = False) -> None:
        super().__init__()
        self.drop_rate, self.always = rate, always
        self.conv, self.norm = nn.Conv1d(3, 3, 1, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> Any:
        y = nn.functional.dropout(self.conv(x), p=self.drop_rate, training=self.training or self.always)
        return self.norm(torch.cat([x, y], 1)).relu()


def _function() -> Case:
    return Case(nn.Sequential(_DenseLayer(0.2)), ("0.norm",), batches=[torch.zeros(2, 3, 4)])


def _in_evaluation_too() -> Case:
    """Dropout that evaluation has as well shifts nothing."""
    return Case(nn.Sequential(_DenseLayer(0.2, always=True)), batches=[torch.zeros(2, 3, 4)])


def _after_the_last() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)))


def _off() -> Case:
    return Case(_Block(nn.Dropout(0.0)), batches=[torch.zeros(2, 3, 4)])


def _keeps_the_variance() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.SELU(), nn.AlphaDropout(0.5), nn.BatchNorm1d(4)))


def _behind_a_layer_norm() -> Case:
    """A normalization in between takes the shift away."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    return Case(model, batches=[torch.randn(2, 3, generator=torch.Generator().manual_seed(0))])


RULE = Rule(
    id="KN112",
    name="dropout-in-front",
    severity="warning",
    summary="A dropout in front of a batch norm shifts the variance between training and evaluation.",
    statistic="The largest rate q of the dropouts whose output reaches the batch norm, with at most one convolution or "
    "linear layer, one sum with another branch and no normalization in between.",
    threshold="Dropout keeps the mean and turns a variance σ² with mean μ into (σ² + μ²)/(1 − q) − μ², at least σ²/(1 "
    "− q). Running statistics are those of training; in evaluation the normalized input is too small by a factor of "
    "√(1 − q) or less. From q = 0.5 on it is a warning: with it in each bottleneck, a DenseNet on CIFAR-100 falls from "
    "77.4 to 68.6 % (source, figure 1). Below it is info: wide residual networks train well with 0.3.",
    source="Li, Chen, Hu, Yang (2018), arXiv:1801.05134, sections 3 and 4.",
    explanation="In training, the batch norm divides by a standard deviation that dropout has enlarged. In evaluation "
    "dropout is off, and the running variance is too large for what comes in. Through many layers the shifts multiply.",
    remedy="Put dropout after the last batch norm, or take it out. kn.recalibrate, which runs with dropout off, gives "
    "statistics that are right for evaluation.",
    check=check,
    sick=(_right_before, _before_a_convolution, _inside_a_block, _function),
    healthy=(_after_the_last, _off, _keeps_the_variance, _behind_a_layer_norm, _in_evaluation_too),
    needs=("neighbors",),
)
