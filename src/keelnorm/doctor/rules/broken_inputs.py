"""KN215: the input of a layer is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, data_of, network, settled
from keelnorm.surgery.observation.nested_tensors import tensors_in


def check(evidence: Evidence) -> Iterator[Finding]:
    """The first layer in the order of the run whose input is not finite: those behind it follow."""
    if evidence.data is None:
        return
    for layer in evidence.layers:
        seen = evidence.data.as_is.get(layer.path)
        if seen is None or seen.moments.is_finite:
            continue
        before = (
            "" if layer.beside is None or not layer.beside.before else f", which {layer.beside.before[0].name} makes"
        )
        yield RULE.found(
            (layer.path,),
            f"The input of {layer.named} is NaN or infinite{before}; no layer in front of it gets such values.",
            _remedy(evidence),
            evidence={"channels": int((~(seen.moments.mean.isfinite() & seen.moments.var.isfinite())).sum())},
        )
        return


def _remedy(evidence: Evidence) -> list[str]:
    batches = evidence.batches
    in_data = batches is not None and any(
        not bool(t.isfinite().all()) for batch in batches for t in tensors_in(batch) if t.is_floating_point()
    )
    if in_data:
        return [
            "def whole(b):\n    return (b if torch.is_tensor(b) else b[0]).isfinite().all()",
            "batches = [b for b in batches if whole(b)]  # the data have NaN or Inf",
        ]
    return [
        "bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]",
        "print(bad or 'all parameters are finite: the activations are too large for their dtype')",
        "for name in bad:  # or load the last finite checkpoint\n"
        "    nn.init.normal_(model.get_parameter(name), std=0.01)",
    ]


def _in_the_data() -> Case:
    model = network()
    settled(model, data_of(), rounds=3)
    batches = data_of()
    batches[2][5, 0, 1, 1] = float("nan")
    return Case(model, ("1",), batches)


def _in_a_weight() -> Case:
    model = network()
    settled(model, data_of(), rounds=3)
    with torch.no_grad():
        at(model, "3").weight[0, 0, 0, 0] = float("inf")
    return Case(model, ("4",), data_of())


def _finite() -> Case:
    return Case(network(), batches=data_of())


def _large() -> Case:
    return Case(nn.Sequential(nn.BatchNorm2d(3)), batches=[1e15 * batch for batch in data_of()])


RULE = Rule(
    id="KN215",
    name="broken-inputs",
    severity="error",
    summary="The input of a layer is NaN or infinite.",
    statistic="Mean and variance of each layer's input in evaluation.",
    threshold="Not finite; the first layer in the order of the run alone, since those behind it follow.",
    source="IEEE 754: sums with NaN are NaN.",
    explanation="Everything behind is NaN, and a step of training makes all running statistics NaN for good; "
    "keelnorm's layers leave such batches out of theirs.",
    remedy="Clean the data, or look at the layer in front: its weights, or a value too large for its dtype.",
    check=check,
    sick=(_in_the_data, _in_a_weight),
    healthy=(_finite, _large),
    needs=("data",),
)
