"""How far running statistics are from the true ones, in what it does to the layer's output, and whether by chance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.evidence.sampled_moments import SampledMoments
from keelnorm.doctor.rules._tests import t_test

#: The batch whose noise costs nearly nothing: ResNet-50's error with 16 images for each normalization is 0.1 points
#: above that with 32, with 8 it is 1.2 (Wu, He 2018, arXiv:1803.08494, table 2).
REFERENCE = 16
REFERENCE_SOURCE = "Wu, He (2018), arXiv:1803.08494, table 2: batches of 16 cost 0.1 points against 32, of 8 1.2"


@dataclass(frozen=True)
class Drift:
    """The distance of a layer's running statistics from those of its inputs.

    Args:
        ratio: The mean squared change of the normalized values, as a multiple of what batches of 16 samples do.
        p_value: The probability of a distance as large in some channel, if the running statistics are an average over
            batches of the same data.
        shift: The largest change of a mean, in standard deviations.
        narrowest: The smallest ratio of a running variance to the true one, both with eps.
        widest: The largest.
        channel: The channel that has changed most.
        divergence: The mean over channels of the Kullback-Leibler divergence of the normal distributions with true and
            with running statistics, in nats.
    """

    ratio: float
    p_value: float
    shift: float
    narrowest: float
    widest: float
    channel: int
    divergence: float


def drift_of(evidence: Evidence, layer: LayerFacts) -> Drift | None:
    """The drift of a layer; None where it has no running statistics of its inputs, or too few samples were seen."""
    true = None if evidence.data is None else evidence.data.moments(layer.path)
    mean, var = layer.running_mean, layer.running_var
    if true is None or mean is None or var is None or mean.shape != true.mean.shape or layer.own_scale is not None:
        return None
    if not bool((mean.isfinite() & var.isfinite() & (var > 0)).all()) or true.samples < 2:
        return None
    change = changed_by(true, mean, var, layer.eps)
    noise = batch_noise(true, REFERENCE, layer.eps)
    total = float(noise.sum())
    unit = true.var + layer.eps
    ratio = (var + layer.eps) / unit
    return Drift(
        ratio=float(change.sum()) / total if total > 0 else (inf if float(change.sum()) > 0 else 0.0),
        p_value=_p_value(true, mean, var, layer),
        shift=float(((mean - true.mean).abs() / unit.sqrt()).max()),
        narrowest=float(ratio.min()),
        widest=float(ratio.max()),
        channel=int(change.argmax()),
        divergence=float(_divergence(true, mean, var, layer.eps).mean()),
    )


def changed_by(true: SampledMoments, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The mean squared change of normalized values under other statistics, per channel.

    x̂ = (x − m)/√(s + ε) in the place of (x − μ)/√(v + ε) changes by (μ − m)²/(s + ε) + v·(1/√(s + ε) − 1/√(v + ε))²
    in the mean of squares.
    """
    scale, right = (var + eps).rsqrt(), (true.var + eps).rsqrt()
    return ((true.mean - mean) * scale).square() + true.var * (scale - right).square()


def batch_noise(true: SampledMoments, samples: float, eps: float) -> Tensor:
    """What a batch of so many samples gives for :func:`changed_by`, on average and in first order, per channel.

    With the standard errors of mean and variance that follow from the spread between samples:
    SE(μ)²/(v + ε) + v·SE(v)²/(4·(v + ε)³). For independent normal values that is 1.5/samples.
    """
    unit = true.var + eps
    return (true.mean_spread / unit + true.var * true.var_spread / (4 * unit**3)) / samples


def _p_value(true: SampledMoments, mean: Tensor, var: Tensor, layer: LayerFacts) -> float:
    """Two tests a channel, on the mean and on the logarithm of the variance, with Bonferroni's correction.

    The standard errors are those of the data's moments and of the running statistics: an exponential average counts as
    (2 − m)/m batches, a cumulative one as all batches.
    """
    batch = max(true.sizes)
    window = float(layer.batches or 1) if layer.momentum is None else (2 - layer.momentum) / max(layer.momentum, 1e-12)
    exactness = 1 / true.samples + 1 / (window * batch)
    tests = []
    moved = (mean - true.mean).abs()
    tests.append((moved, (true.mean_spread * exactness).sqrt()))
    there = true.var > 0
    logs = torch.where(there, (var / true.var.clamp(min=torch.finfo(torch.float64).tiny)).log().abs(), 0.0)
    tests.append((logs, (true.var_spread * exactness).sqrt() / true.var.clamp(min=torch.finfo(torch.float64).tiny)))
    smallest = min(float(t_test(distance, error, true.samples - 1).min()) for distance, error in tests)
    return min(1.0, 2 * len(mean) * smallest)


def _divergence(true: SampledMoments, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    ratio = (true.var + eps) / (var + eps)
    return 0.5 * (ratio - 1 - ratio.log() + (true.mean - mean).square() / (var + eps))


def drifted(evidence: Evidence, layers: Iterable[LayerFacts]) -> list[tuple[LayerFacts, Drift]]:
    """The layers whose drift does more than the noise of a batch of 16 samples, with their drifts."""
    found = [(layer, drift_of(evidence, layer)) for layer in layers]
    return [(layer, drift) for layer, drift in found if drift is not None and drift.ratio > 1]


def number_of_drifts(evidence: Evidence, layers: Iterable[LayerFacts]) -> int:
    """How many tests these layers are worth: one for each whose drift is known."""
    return sum(drift_of(evidence, layer) is not None for layer in layers)


def initial_share(layer: LayerFacts) -> float:
    """How much of the running statistics is still that of a new layer: (1 − m)ᵗ after t batches."""
    if layer.momentum is None or not layer.batches or not 0 < layer.momentum < 1:
        return 0.0
    return float((1 - layer.momentum) ** layer.batches)


def is_unsettled(evidence: Evidence, layer: LayerFacts) -> bool:
    """Whether the drift comes from the values of a new layer: without their share it would be less than half."""
    share = initial_share(layer)
    true = None if evidence.data is None else evidence.data.moments(layer.path)
    mean, var = layer.running_mean, layer.running_var
    if true is None or mean is None or var is None or not 1e-3 < share < 1 or mean.shape != true.mean.shape:
        return False
    settled_mean, settled_var = mean / (1 - share), ((var - share) / (1 - share)).clamp(min=0)
    now = changed_by(true, mean, var, layer.eps).sum()
    then = changed_by(true, settled_mean, settled_var, layer.eps).sum()
    return bool(then < now / 2)
