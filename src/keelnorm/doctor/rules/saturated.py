"""KN210: the activation behind a layer passes no gradient on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layer_inputs import Outputs
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, data_of, settled

#: The share of a channel's values from which it is called saturated.
SHARE = 0.99


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer whose activation is flat over the data in some channels."""
    for layer in evidence.layers:
        seen = None if evidence.data is None else evidence.data.as_is.get(layer.path)
        if seen is None or seen.outputs is None or layer.is_initial:
            continue
        flat = _flat(seen.outputs)
        number, channels = int(flat.sum()), flat.numel()
        if not number:
            continue
        index = ":" if number == channels else str(flat.nonzero().flatten().tolist())
        how = "is never positive" if seen.outputs.activation == "relu" else "is far from 0"
        yield RULE.found(
            (layer.path,),
            f"In {number} of {channels} channels, the output of {layer.named} {how} in evaluation: the "
            f"{seen.outputs.activation} behind it passes no gradient on.",
            [f"layer = {layer.code}", *_remedy(layer.weight is not None, layer.bias is not None, index)],
            severity="warning" if number == channels else "info",
            evidence={"channels": number, "of": channels, "threshold": SHARE, "activation": seen.outputs.activation},
        )


def _flat(outputs: Outputs) -> torch.Tensor:
    return outputs.highest <= 0 if outputs.saturated is None else outputs.saturated >= SHARE


def _remedy(weight: bool, bias: bool, index: str) -> list[str]:
    lines = [f"    layer.weight[{index}] = 1.0"] * weight + [f"    layer.bias[{index}] = 0.0"] * bias
    if not lines:
        return ["# look at the running statistics: kn.recalibrate(model, batches)"]
    return ["with torch.no_grad():  # as in a new layer; then train on\n" + "\n".join(lines)]


def _model(activation: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm2d(3), activation, nn.Flatten(), nn.Linear(192, 2))
    settled(model, data_of(), rounds=10)
    return model


def _dead() -> Case:
    model = _model(nn.ReLU())
    with torch.no_grad():
        at(model, "0").bias[1] = -20.0
    return Case(model, ("0",), data_of())


def _all_dead() -> Case:
    model = _model(nn.ReLU())
    nn.init.constant_(at(model, "0").bias, -20.0)
    return Case(model, ("0",), data_of())


def _tanh() -> Case:
    model = _model(nn.Tanh())
    nn.init.constant_(at(model, "0").bias, 12.0)
    return Case(model, ("0",), data_of())


def _working() -> Case:
    return Case(_model(nn.ReLU()), batches=data_of())


def _in_the_middle() -> Case:
    return Case(_model(nn.Sigmoid()), batches=data_of())


RULE = Rule(
    id="KN210",
    name="saturated",
    severity="warning",
    summary="The activation behind a layer passes no gradient on.",
    statistic="Per channel, in evaluation: the largest output in front of a ReLU; in front of a sigmoid or tanh, the "
    "share of outputs where its derivative is less than a hundredth of its largest.",
    threshold=f"No output above 0, or a share of at least {SHARE:g}. Info where it is some channels; a warning where "
    "it is all. New layers, whose statistics are not those of data, are left out.",
    source='Glorot, Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks", '
    "section 3: saturation; Ioffe, Szegedy (2015), arXiv:1502.03167, section 1.",
    explanation="β has moved so far that the normalized values reach one side of the activation only: the channel is "
    "constant, or linear in nothing, and it can't come back, since no gradient reaches γ and β.",
    remedy="Reset γ and β of these channels and train on with a smaller learning rate, or prune them.",
    check=check,
    sick=(_dead, _all_dead, _tanh),
    healthy=(_working, _in_the_middle),
    needs=("data", "neighbors"),
)
