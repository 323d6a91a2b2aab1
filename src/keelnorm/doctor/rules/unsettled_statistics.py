"""KN203: the running statistics still have a share of the values of a new layer."""

from __future__ import annotations

from collections.abc import Iterator

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule, by_recalibrating
from keelnorm.doctor.rules._drift import (
    REFERENCE,
    REFERENCE_SOURCE,
    drifted,
    initial_share,
    is_unsettled,
    number_of_drifts,
)
from keelnorm.doctor.rules._examples import at, data_of, network, settled
from keelnorm.doctor.rules.drifted_statistics import plain, where_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer that has drifted, and would have by less than half without the share of mean 0 and variance 1."""
    judged = _judged(evidence)
    found = [(layer, drift) for layer, drift in drifted(evidence, judged) if is_unsettled(evidence, layer)]
    for layer, drift in found:
        share = initial_share(layer)
        yield RULE.found(
            (layer.path,),
            f"{layer.named} has counted {layer.batches} batches with momentum {layer.momentum:g}: {100 * share:.2g} % "
            "of its running statistics are still mean 0 and variance 1, the values of a new layer.",
            [
                f"kn.recalibrate(model, batches{where_of(layer, len(found), len(judged))})",
                "# or in training: momentum=None, or kn.accumulate_statistics in the last epoch",
            ],
            evidence={**plain(evidence, drift), "share": share, "batches": layer.batches, "momentum": layer.momentum},
            p_value=drift.p_value,
        )


def _judged(evidence: Evidence) -> list[LayerFacts]:
    """Layers that have seen batches, and too few of them."""
    return [layer for layer in evidence.layers if initial_share(layer) > 1e-3]


def _tests(evidence: Evidence) -> int:
    return number_of_drifts(evidence, _judged(evidence))


def _after_few_batches() -> Case:
    model = network(scale=8.0)
    batches = data_of()
    settled(model, batches)
    return Case(model, ("1", "4"), batches)


def _with_a_small_momentum() -> Case:
    model = network(scale=8.0)
    for path in ("1", "4"):
        at(model, path).momentum = 1e-3
    settled(model, data_of(), rounds=5)
    return Case(model, ("1", "4"), data_of())


def _after_many_batches() -> Case:
    model = network(scale=8.0)
    settled(model, data_of(), rounds=10)
    return Case(model, batches=data_of())


def _cumulative() -> Case:
    model = network(scale=8.0)
    for path in ("1", "4"):
        at(model, path).momentum = None
    settled(model, data_of())
    return Case(model, batches=data_of())


def _moved_elsewhere() -> Case:
    """The reason is another one."""
    model = network()
    settled(model, data_of())
    at(model, "4").running_mean.sub_(5.0)
    return Case(model, batches=data_of())


RULE = Rule(
    id="KN203",
    name="unsettled-statistics",
    severity="warning",
    summary="Running statistics still have a share of the values of a new layer.",
    statistic="(1 − m)ᵗ, the share of mean 0 and variance 1 after t batches with momentum m, and the drift (KN201).",
    threshold=f"Where the layer has drifted by more than the statistics of {REFERENCE} samples do, as in KN201, and "
    "without that share would have by less than half.",
    source=f"The definition of the exponential average. {REFERENCE_SOURCE}.",
    explanation="A moving average forgets its first value slowly: with momentum 0.1, 18 % of it is left after 16 "
    "batches, with 0.01 after 170. Evaluation is then worse than training, or better by chance, until more batches "
    "have been seen; accumulation over micro-batches makes a run shorter still.",
    remedy="Compute the running statistics from data, train longer, or take a larger momentum or momentum=None.",
    check=check,
    sick=(_after_few_batches, _with_a_small_momentum),
    healthy=(_after_many_batches, _cumulative, _moved_elsewhere),
    needs=("data",),
    in_training=False,
    tests=_tests,
    fix=by_recalibrating,
)
