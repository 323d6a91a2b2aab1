"""KN105: a layer has no running statistics, or no longer updates them, so evaluation is not what training saw."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer without running statistics, with half of them, or with statistics that nothing updates."""
    samples = None if evidence.batches is None else evidence.batches.samples
    for layer in evidence.layers:
        alone = evidence.raised_in(layer.module) or (samples == 1 and not evidence.core.training)
        judged = None if layer.fixed or layer.held else _judged(layer, alone=alone)
        if judged is not None:
            severity, why = judged
            yield RULE.found(
                (layer.path,),
                f"{layer.named} {why}.",
                _remedy(layer, batches=evidence.batches is not None),
                severity=severity,
                evidence={"track_running_stats": layer.tracks, "running statistics": layer.has_statistics},
            )


def _judged(layer: LayerFacts, *, alone: bool) -> tuple[Severity, str] | None:
    """Severity and reason.

    Args:
        layer: The layer.
        alone: Whether the layer raised in evaluation, or the batches have one sample.
    """
    buffers = [getattr(layer.module, name, None) for name in ("running_mean", "running_var")]
    if sum(value is None for value in buffers) == 1:
        return "error", "has only one of running mean and running variance, so evaluation raises"
    if not layer.has_statistics:
        why = (
            "has no running statistics: in evaluation the batch normalizes, and a sample's output depends on the others"
        )
        if alone:
            return "error", f"{why}; with one sample that raises, or is instance normalization"
        return "warning", why
    if not layer.tracks:
        return "warning", (
            "has track_running_stats=False beside running statistics: training no longer updates what evaluation uses"
        )
    return None


def _remedy(layer: LayerFacts, *, batches: bool) -> list[str]:
    lines = [f"layer = {layer.code}", "layer.track_running_stats = True"]
    if not layer.has_statistics:
        lines += [
            "layer.register_buffer('running_mean', torch.zeros(layer.num_features))",
            "layer.register_buffer('running_var', torch.ones(layer.num_features))",
            "layer.register_buffer('num_batches_tracked', torch.tensor(0))",
        ]
    where = f", where={layer.path!r}" if layer.path else ""
    return [*lines, f"kn.recalibrate(model, batches{where})"] if batches else lines


def _not_tracked() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU()), ("0",), batches_of(4, 3, 5))


def _one_sample() -> Case:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU())
    return Case(model.eval(), ("0",), batches_of(1, 3, 5))


def _one_value() -> Case:
    """One sample without positions: evaluation raises."""
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU())
    return Case(model.eval(), ("0",), example=torch.ones(1, 3))


def _removed() -> Case:
    """As in recipes on the internet, for "evaluation with batch statistics"."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    layer = at(model, "0")
    layer.running_mean = layer.running_var = None
    return Case(model, ("0",))


def _half_removed() -> Case:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    at(model, "0").running_var = None
    return Case(model, ("0",))


def _switched_off() -> Case:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    at(model, "0").track_running_stats = False
    return Case(model, ("0",), batches_of(4, 3, 5))


def _tracked() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).eval(), batches=batches_of(1, 3, 5))


def _frozen() -> Case:
    from keelnorm.control import freeze

    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    freeze(model)
    return Case(model)


RULE = Rule(
    id="KN105",
    name="statistics-off",
    severity="error",
    summary="A batch norm has no running statistics, or no longer updates them.",
    statistic="The buffers running_mean and running_var, and track_running_stats.",
    threshold="Any of them missing or off. A warning, because generators and meta-learning do so on purpose; an error "
    "where evaluation raises, or where the model is in evaluation and the batches have one sample: each image is then "
    "normalized by itself, as in instance normalization, and not as in training.",
    source="torch.nn.BatchNorm2d, track_running_stats; Nichol, Achiam, Schulman (2018), arXiv:1803.02999, on what "
    "transduction through batch statistics does to evaluation.",
    explanation="Without running statistics the batch normalizes in evaluation too: the output of a sample depends on "
    "which others are beside it, and a batch of one is a different function. If only track_running_stats was set to "
    "False, training normalizes with the batch, and evaluation with statistics that are no longer updated.",
    remedy="Track running statistics, and compute them from data with kn.recalibrate.",
    check=check,
    sick=(_not_tracked, _one_sample, _one_value, _removed, _half_removed, _switched_off),
    healthy=(_tracked, _frozen),
)
