"""KN209: means are so far above the deviations that the input has lost its digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import data_of, network

#: The rounding unit of bfloat16, of which networks are known to bear no more: eight bits.
LARGEST = 2.0**-8


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer whose input, less its mean, is as inexact as bfloat16 or more."""
    for layer in evidence.layers:
        seen = None if evidence.data is None else evidence.data.as_is.get(layer.path)
        if seen is None or not seen.moments.is_finite or not layer.dtypes:
            continue
        true = seen.moments
        unit = torch.finfo(next(iter(layer.dtypes.values()))).eps / 2
        error = unit * true.mean.abs() / (true.var + layer.eps).sqrt()
        lost = error > LARGEST
        if bool(lost.any()):
            channel = int(error.argmax())
            yield RULE.found(
                (layer.path,),
                f"The input of {layer.named} has lost digits in {int(lost.sum())} of {len(lost)} channels: in channel "
                f"{channel} its mean is {float(true.mean[channel]):.3g} and its deviation "
                f"{float(true.var[channel]) ** 0.5:.3g}, so that x̂ is off by {float(error.max()):.2g}.",
                [
                    "first = batches[0] if torch.is_tensor(batches[0]) else batches[0][0]",
                    "mean = first.double().mean([0, *range(2, first.ndim)], keepdim=True)",
                    "def centered(x):  # subtract in the data, before it is rounded to float32\n"
                    "    return (x.double() - mean).to(x.dtype)",
                    "batches = [centered(b) if torch.is_tensor(b) else (centered(b[0]), *b[1:]) for b in batches]",
                ],
                evidence={"error": float(error.max()), "channel": channel, "threshold": LARGEST},
            )


def _moved(by: float) -> list[Tensor]:
    return [batch + by for batch in data_of()]


def _far_away() -> Case:
    return Case(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), ("0",), _moved(1e6))


def _seconds_since_1970() -> Case:
    generator = torch.Generator().manual_seed(0)
    times = [1.7e9 + 3600 * torch.rand(32, 2, generator=generator) for _ in range(4)]
    return Case(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), ("0",), times)


def _near() -> Case:
    return Case(network(), batches=_moved(0.0))


def _pixels() -> Case:
    """Means of a hundred are harmless."""
    return Case(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), batches=_moved(100.0))


RULE = Rule(
    id="KN209",
    name="lost-digits",
    severity="warning",
    summary="Means are so far above the deviations that the input has lost its digits.",
    statistic="The rounding error of a normalized value, u·|μ|/√(v + ε), with the rounding unit u of the layer's dtype "
    "(6e-8 in float32), per channel.",
    threshold="Above 2⁻⁸, the rounding unit of bfloat16: below it, training is known to work.",
    source='Kalamkar et al. (2019), arXiv:1905.12322: training in bfloat16. Higham (2002), "Accuracy and Stability of '
    'Numerical Algorithms", section 1.7: cancellation.',
    explanation="x is rounded to its dtype before the mean is subtracted, and no kernel can bring the digits back: "
    "values that differ become equal. Time stamps, coordinates and identifiers among the features are like this.",
    remedy="Subtract a constant in the data, in float64.",
    check=check,
    sick=(_far_away, _seconds_since_1970),
    healthy=(_near, _pixels),
    needs=("data",),
)
