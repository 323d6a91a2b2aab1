"""KN103: the momentum of the running statistics is 0, about 1, or not legal."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule

#: Keras's default is 0.99 and TensorFlow's networks have 0.9 to 0.9997; PyTorch's 1 − that are the values in use there.
KERAS = 0.9
#: The average of an exponential window counts as (2 − m)/m batches: fewer than two from here on.
TWO_BATCHES = 2 / 3


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer whose running statistics follow the batches not at all, or follow nothing but the last one."""
    for layer in evidence.layers:
        if layer.held or layer.fixed or not layer.tracks or not layer.has_statistics or layer.momentum is None:
            continue
        judged = _judged(layer, layer.momentum)
        if judged is not None:
            severity, why, better = judged
            yield RULE.found(
                (layer.path,),
                f"{layer.named} has momentum {layer.momentum:g}: {why}.",
                [f"{layer.code}.momentum = {better:g}"],
                severity=severity,
                evidence={"momentum": layer.momentum, "threshold": TWO_BATCHES, "batches averaged": _window(layer)},
            )


def _judged(layer: LayerFacts, momentum: float) -> tuple[Severity, str, float] | None:
    if not 0 <= momentum <= 1:
        return "error", "the running statistics drift away; a weight of a batch lies between 0 and 1", 0.1
    if momentum == 0:
        never = "the running statistics never change"
        if layer.is_initial:
            return "error", f"{never}, and are those of a new layer, mean 0 and variance 1", 0.1
        return "warning", f"{never}; kn.freeze is the way to keep them", 0.1
    if momentum == 1:
        return "warning", "the running statistics are those of the last batch", 0.1
    if momentum >= KERAS:
        less = round(1 - momentum, 12)
        share = f"each batch replaces {momentum:.4g} of the running statistics"
        return "warning", f"{share}; what Keras calls {momentum:g} is {less:g} here", less
    if momentum > TWO_BATCHES:
        return "info", "the running statistics average fewer than two batches", 0.1
    return None


def _window(layer: LayerFacts) -> float:
    """The number of equally weighted batches whose average is as exact."""
    momentum = layer.momentum
    return math.inf if not momentum else (2 - momentum) / momentum


def fix(model: nn.Module, finding: Finding, evidence: Evidence) -> str:
    """Set the momentum; this changes no output."""
    layer = evidence[finding.layers[0]]
    assert layer.momentum is not None
    judged = _judged(layer, layer.momentum)
    assert judged is not None
    layer.module.momentum = judged[2]  # type: ignore[assignment]
    return f"momentum was set from {layer.momentum:g} to {judged[2]:g}"


def _layer(momentum: float | None, *, trained: bool = False) -> Case:
    norm = nn.BatchNorm1d(4, momentum=momentum)
    if trained and norm.running_mean is not None:
        norm.running_mean.copy_(torch.arange(4))
    return Case(nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.ReLU()), ("1",))


def _keras() -> Case:
    return _layer(0.99)


def _zero() -> Case:
    return _layer(0.0)


def _zero_after_training() -> Case:
    return _layer(0.0, trained=True)


def _one() -> Case:
    return _layer(1.0)


def _more_than_one() -> Case:
    return _layer(1.5)


def _less_than_two_batches() -> Case:
    return _layer(0.75)


def _usual() -> Case:
    return _layer(0.1)


def _cumulative() -> Case:
    return _layer(None)


def _small() -> Case:
    return _layer(0.0003)


RULE = Rule(
    id="KN103",
    name="momentum",
    severity="error",
    summary="The momentum is 0, 1, not legal, or meant in Keras's sense.",
    statistic="The momentum m: new = (1 − m)·old + m·batch.",
    threshold="The average counts as (2 − m)/m equally weighted batches. For m > 2/3 these are fewer than two, and the "
    "running statistics are hardly more exact than one batch (info). From m = 0.9 on it is Keras's momentum, whose "
    "values lie between 0.9 and 0.9997 (warning). Outside of 0 to 1 the average diverges or oscillates, and with 0 a "
    "new layer evaluates with mean 0 and variance 1 (error).",
    source="torch.nn.BatchNorm2d, note on momentum; Keras, BatchNormalization(momentum=0.99), where it is the weight "
    "of the old value.",
    explanation="PyTorch's momentum is the weight of the new batch, Keras's that of the old average. A value that was "
    "copied from Keras makes the running statistics those of the last batch, and evaluation as noisy as a batch.",
    remedy="Set layer.momentum to 1 − m for Keras's m, else to 0.1, PyTorch's default.",
    check=check,
    sick=(_keras, _zero, _zero_after_training, _one, _more_than_one, _less_than_two_batches),
    healthy=(_usual, _cumulative, _small),
    fix=fix,
)
