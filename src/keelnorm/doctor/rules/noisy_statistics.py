"""KN204: the momentum is too large for the batches, so that the running statistics are noise."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE
from keelnorm.doctor.rules._examples import batches_of
from keelnorm.doctor.rules.momentum import TWO_BATCHES

_BETTER = 0.1


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer in training whose running statistics are those of fewer than 16 samples."""
    samples = None if evidence.batches is None else evidence.batches.samples
    for layer in evidence.layers:
        if samples is None or not layer.updates or layer.momentum is None or layer.is_variant:
            continue
        if not _BETTER < layer.momentum <= TWO_BATCHES:  # beyond, KN103 speaks
            continue
        averaged = _averaged(layer, samples * evidence.ranks)
        if averaged < REFERENCE:
            yield RULE.found(
                (layer.path,),
                f"{layer.named} has momentum {layer.momentum:g} and batches of {samples}: its running statistics are "
                f"as exact as those of {averaged:.3g} samples.",
                [f"{layer.code}.momentum = {_BETTER:g}"],
                evidence={
                    "momentum": layer.momentum, "samples": samples, "averaged": averaged, "threshold": REFERENCE,
                },
            )  # fmt: skip


def _averaged(layer: LayerFacts, samples: int) -> float:
    assert layer.momentum is not None
    return samples * (2 - layer.momentum) / layer.momentum


def fix(model: nn.Module, finding: Finding, evidence: Evidence) -> str:
    """Set the momentum; this changes no output."""
    layer = evidence[finding.layers[0]]
    layer.module.momentum = _BETTER  # type: ignore[assignment]
    return f"momentum was set from {layer.momentum:g} to {_BETTER:g}"


def _case(momentum: float | None, samples: int, *, sick: bool = False) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU())
    return Case(model, ("1",) if sick else (), batches_of(samples, 3))


def _half_of_two() -> Case:
    return _case(0.5, 2, sick=True)


def _of_pairs() -> Case:
    return _case(0.3, 2, sick=True)


def _usual() -> Case:
    return _case(0.1, 2)


def _large_batches() -> Case:
    return _case(0.5, 64)


def _cumulative() -> Case:
    return _case(None, 2)


def _of_keras() -> Case:
    return _case(0.99, 2)


RULE = Rule(
    id="KN204",
    name="noisy-statistics",
    severity="warning",
    summary="The momentum is too large for such batches: the running statistics are noise.",
    statistic="The number of samples whose average is as exact as an exponential average of batches of n samples with "
    "momentum m: n·(2 − m)/m.",
    threshold=f"Fewer than {REFERENCE}, for momenta above 0.1, PyTorch's default, and up to 2/3; beyond, KN103 speaks.",
    source=f"The variance of an exponential average of independent values, m/(2 − m) of theirs. {REFERENCE_SOURCE}.",
    explanation="Evaluation depends on the last few samples that were seen in training.",
    remedy="Take a smaller momentum, or larger batches.",
    check=check,
    sick=(_half_of_two, _of_pairs),
    healthy=(_usual, _large_batches, _cumulative, _of_keras),
    needs=("batch",),
    fix=fix,
)
