"""KN205: the batches are so small that their mean and variance are noise."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE
from keelnorm.doctor.rules._examples import batches_of, network


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer in training that normalizes with fewer than 16 independent values, from fewer than 16 samples."""
    data = evidence.data
    if data is None:
        return
    for layer in evidence.layers:
        true = data.moments(layer.path)
        if true is None:
            continue
        # What the layer sees: a head may get several rows of each sample.
        samples = max(true.sizes) * max(evidence.ranks, 1)
        if samples >= REFERENCE or not layer.training or layer.held or layer.fixed or layer.is_variant:
            continue
        varying = true.var > layer.eps
        if not bool(varying.any()):
            continue
        effective = float(true.effective(samples)[varying].median())
        if effective < REFERENCE:
            error = sqrt(2 / max(effective - 1, 1e-9)) if effective > 1 else float("inf")
            yield RULE.found(
                (layer.path,),
                f"{layer.named} normalizes with batches of {samples} samples, which are worth {effective:.3g} "
                f"independent values: {_exactness(error)}.",
                _remedy(layer),
                evidence={
                    "samples": samples, "effective": effective, "values": true.values / len(true.sizes),
                    "standard error": error, "threshold": REFERENCE,
                },
            )  # fmt: skip


def _exactness(error: float) -> str:
    if error == float("inf"):
        return "their variance is not defined"
    return f"their variance has a standard error of {100 * error:.0f} %"


def _remedy(layer: LayerFacts) -> list[str]:
    """Batch renormalization has the same state, and normalizes as evaluation does, up to bounds."""
    if not layer.path or not layer.has_statistics:
        return ["# larger batches, or a layer of docs/small_batches.md in the place of the batch norm"]
    return [
        f"old = {layer.code}  # or larger batches; in fine-tuning: kn.freeze(model)",
        f"model.set_submodule({layer.path!r}, kn.BatchRenorm(old.num_features, eps=old.eps, momentum=old.momentum))",
        f"{layer.code}.load_state_dict(old.state_dict())",
    ]


def _pairs() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    return Case(model, ("1",), [batch for half in batches_of(8, 3) for batch in half.split(2)])


def _deep_in_a_network() -> Case:
    """Few positions are left there, and they are correlated."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(8), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    return Case(model, ("4",), batches_of(4, 3, 8, 8))


def _enough() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), batches=batches_of(16, 3))


def _few_images() -> Case:
    """Four images of many positions."""
    return Case(network(), batches=batches_of(4, 3, 8, 8))


def _in_evaluation() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), batches=batches_of(2, 3))


RULE = Rule(
    id="KN205",
    name="small-batches",
    severity="warning",
    summary="The batches are so small that their mean and variance are noise.",
    statistic="The number of independent values in a batch: n·v/s², with n samples, the variance v of the values and "
    "the variance s² of the samples' means. Positions of a sample are correlated, so that it lies between n and the "
    "number of values; the median over channels.",
    threshold=f"Fewer than {REFERENCE} independent values from fewer than {REFERENCE} samples, in training. For "
    "independent normal values the standard error of a variance is √(2/(n − 1)) of it.",
    source=f"{REFERENCE_SOURCE}. Ioffe (2017), arXiv:1702.03275, section 4: small and unlike batches.",
    explanation="Each value is normalized by statistics of which it is a large part, so that training computes another "
    "function than evaluation.",
    remedy="Take larger batches, synchronize processes, or another layer: batch renormalization, cross-iteration batch "
    "normalization; in fine-tuning, freeze the statistics.",
    check=check,
    sick=(_pairs, _deep_in_a_network),
    healthy=(_enough, _few_images, _in_evaluation),
    needs=("data",),
)
