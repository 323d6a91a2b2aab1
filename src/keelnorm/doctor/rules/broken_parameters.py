"""KN117: γ or β is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule

_WORDS = {"weight": "γ", "bias": "β"}


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer with a parameter that is not finite."""
    others = None
    for layer in evidence.layers:
        for name, word in _WORDS.items():
            values = getattr(layer, name)
            number = 0 if values is None else int((~values.isfinite()).sum())
            if not number:
                continue
            others = _others(evidence) if others is None else others
            beside = f" So are {others} parameters of other layers." if others else ""
            yield RULE.found(
                (layer.path,),
                f"{word} of {layer.named} is NaN or infinite in {number} of {values.numel()} channels.{beside}",
                [f"{layer.code}.reset_parameters()  # better: load the last weights that were finite"],
                evidence={"entry": name, "channels": number, "of": values.numel(), "other parameters": others},
            )


def _others(evidence: Evidence) -> int:
    """The number of other parameters with a value that is not finite."""
    own = {id(value) for layer in evidence.layers for value in layer.module.parameters()}
    return sum(
        not bool(value.isfinite().all())
        for value in evidence.model.parameters()
        if id(value) not in own and not value.is_meta and (value.is_floating_point() or value.is_complex())
    )


def _case(name: str, value: float, *, sick: bool = True) -> Case:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())
    with torch.no_grad():
        getattr(model[1], name)[2] = value
    return Case(model, ("1",) if sick else ())


def _nan_weight() -> Case:
    return _case("weight", float("nan"))


def _infinite_bias() -> Case:
    case = _case("bias", float("-inf"))
    with torch.no_grad():
        case.model[0].weight[0] = float("nan")  # type: ignore[index]
    return case


def _large() -> Case:
    return _case("weight", 1e30, sick=False)


def _without_parameters() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.ReLU()))


RULE = Rule(
    id="KN117",
    name="broken-parameters",
    severity="error",
    summary="γ or β is NaN or infinite.",
    statistic="The values of γ and β, and of the other parameters beside them.",
    threshold="NaN or infinite: the channel's output is never finite again.",
    source="The definition, y = (x − mean) / √(var + eps) · γ + β.",
    explanation="A step with a NaN or infinite gradient has reached the parameters. Everything behind the layer is "
    "NaN, and no later step repairs it.",
    remedy="Load the last weights that were finite. Look for the source with torch.autograd.detect_anomaly, and clip "
    "gradients or lower the learning rate.",
    check=check,
    sick=(_nan_weight, _infinite_bias),
    healthy=(_large, _without_parameters),
)
