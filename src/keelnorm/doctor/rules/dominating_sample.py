"""KN214: one sample makes most of the variance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import data_of, network

#: A majority.
SHARE = 0.5
#: With fewer samples, one of them has a large share by chance.
FEWEST = 64


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer in most of whose channels one sample has the majority of the squared deviations."""
    for layer in evidence.layers:
        seen = None if evidence.data is None else evidence.data.as_is.get(layer.path)
        if seen is None or not seen.moments.is_finite or seen.moments.samples < FEWEST:
            continue
        moments = seen.moments
        varying = moments.var > layer.eps
        if not bool(varying.any()):
            continue
        # In evaluation, deep layers may amplify a sample that is like others where each batch is normalized.
        normalized = evidence.data.true.get(layer.path) if evidence.data is not None else None
        largest = moments.largest
        if normalized is not None and normalized.moments.is_finite:
            largest = torch.minimum(largest, normalized.moments.largest)
        share = float(largest[varying].median())
        if share > SHARE:
            yield RULE.found(
                (layer.path,),
                f"One of {moments.samples} samples makes {100 * share:.0f} % of the variance of the input of "
                f"{layer.named}, in the median of its channels.",
                [
                    "size = torch.cat([(b if torch.is_tensor(b) else b[0]).flatten(1).abs().amax(1) for b in batches])",
                    "def usual(b):  # leave out, or clip, samples that are ten times as large as the median",
                    "    keep = (b if torch.is_tensor(b) else b[0]).flatten(1).abs().amax(1) < 10 * size.median()",
                    "    return b[keep] if torch.is_tensor(b) else tuple(part[keep] for part in b)",
                    "batches = [usual(b) for b in batches]",
                ],
                evidence={"share": share, "samples": moments.samples, "threshold": SHARE},
            )


def _with_one(scale: float) -> list[Tensor]:
    batches = data_of(batches=4)
    batches[0][3] *= scale
    return batches


def _a_thousandfold() -> Case:
    return Case(network(), ("1",), _with_one(1000.0))


def _usual() -> Case:
    return Case(network(), batches=_with_one(1.0))


def _heavy_tails() -> Case:
    """Student's t with three degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 4, 32, 3, generator=generator)
    values = normal[0] / (normal[1:].square().mean(0)).sqrt()
    return Case(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), batches=list(values))


RULE = Rule(
    id="KN214",
    name="dominating-sample",
    severity="warning",
    summary="One sample makes most of the variance.",
    statistic="The share of one sample in the sum of squared deviations of a layer's input, per channel; the median "
    "over channels. The smaller one of evaluation and of layers that normalize with the batch: a network that has not "
    "trained long amplifies samples in evaluation.",
    threshold=f"A majority, among {FEWEST} samples or more. Among so many normal values the largest share is about a "
    "tenth.",
    source='The definition of the variance; Huber (1981), "Robust Statistics": one outlier decides it.',
    explanation="In the batch of that sample all others are normalized to nearly one value, and its variance enters "
    "the running one. A broken file, another unit or a missing value coded as a large number does it.",
    remedy="Clean or clip the data.",
    check=check,
    sick=(_a_thousandfold,),
    healthy=(_usual, _heavy_tails),
    needs=("data",),
)
