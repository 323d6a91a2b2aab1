"""KN201: running statistics are away from those of the data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule, by_recalibrating
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE, Drift, drifted, is_unsettled, number_of_drifts
from keelnorm.doctor.rules._examples import at, data_of, network, settled


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer whose running statistics change its outputs by more than the noise of a small batch does."""
    judged = _judged(evidence)
    found = [(layer, drift) for layer, drift in drifted(evidence, judged) if not is_unsettled(evidence, layer)]
    for layer, drift in found:
        thaw = [f"kn.unfreeze({layer.code}, affine=False)"] if layer.held else []
        yield RULE.found(
            (layer.path,),
            f"{layer.named} evaluates with statistics that differ from the data's {drift.ratio:.3g} times as much as "
            f"those of {REFERENCE} samples: {_how(drift)}.",
            [*thaw, f"kn.recalibrate(model, batches{where_of(layer, len(found), len(judged))})"],
            severity=_severity(evidence, layer),
            evidence=plain(evidence, drift),
            p_value=drift.p_value,
        )


def _judged(evidence: Evidence) -> list[LayerFacts]:
    """Layers with running statistics that have seen a batch, or that someone has set."""
    return [layer for layer in evidence.layers if not layer.is_initial and not layer.fixed]


def _tests(evidence: Evidence) -> int:
    return number_of_drifts(evidence, _judged(evidence))


def where_of(layer: LayerFacts, found: int, judged: int) -> str:
    """The argument that restricts a call to one layer, unless half of the layers need it."""
    return f", where={layer.path!r}" if layer.path and 2 * found < judged else ""


def _how(drift: Drift) -> str:
    widths = f"the variance by factors of {drift.narrowest:.3g} to {drift.widest:.3g}"
    return f"the mean by up to {drift.shift:.3g} standard deviations, {widths}"


def _severity(evidence: Evidence, layer: LayerFacts) -> Severity:
    """A warning where the model's outputs leave the right ones by more than batches of 16 samples make them do."""
    data = evidence.data
    assert data is not None
    if layer.held:
        return "info"
    if data.against_true is None or data.batch_against_true is None or not data.samples:
        return "warning"
    noise = data.batch_against_true.difference * (data.samples / REFERENCE) ** 0.5
    return "warning" if data.against_true.difference > noise else "info"


def plain(evidence: Evidence, drift: Drift) -> dict[str, float | int | None]:
    """The numbers of a drift, and what it does to the outputs of the model."""
    compared = None if evidence.data is None else evidence.data.against_true
    return {
        "ratio": drift.ratio, "threshold": 1.0, "mean": drift.shift, "narrowest variance": drift.narrowest,
        "widest variance": drift.widest, "channel": drift.channel, "divergence": drift.divergence,
        "change of the outputs": None if compared is None else compared.difference,
        "predictions changed": None if compared is None else compared.changed,
    }  # fmt: skip


def _of_other_data() -> Case:
    """Trained on data of another scale."""
    model = network()
    settled(model, data_of(shift=0.0))
    return Case(model, ("1",), [3 * batch + 1 for batch in data_of(shift=0.0)])


def _in_the_middle() -> Case:
    """One layer was put back to an older state."""
    model = network()
    batches = data_of()
    settled(model, batches, rounds=10)
    at(model, "4").running_mean.add_(2.0)
    at(model, "4").running_var.mul_(5.0)
    return Case(model, ("4",), batches)


def _one_channel() -> Case:
    model = network()
    batches = data_of()
    settled(model, batches, rounds=10)
    at(model, "1").running_mean[3] += 10.0
    return Case(model, ("1",), batches)


def _trained_on_it() -> Case:
    model = network()
    settled(model, data_of(), rounds=10)
    return Case(model, batches=data_of())


def _trained_on_other_samples() -> Case:
    model = network()
    settled(model, data_of(seed=1), rounds=10)
    return Case(model.eval(), batches=data_of(seed=2))


def _new() -> Case:
    return Case(network(), batches=data_of())


def _constant() -> Case:
    """A channel that nothing reaches: its running variance is on its way to 0."""
    model = network()
    with torch.no_grad():
        at(model, "0").weight[2] = 0.0
    settled(model, data_of(), rounds=10)
    return Case(model, batches=data_of())


RULE = Rule(
    id="KN201",
    name="drifted-statistics",
    severity="warning",
    summary="Running statistics are away from the moments of the data.",
    statistic="With the data's mean μ and variance v of each layer's input, where all layers in front normalize with "
    "the batch, and running statistics m and s: the mean squared change of the normalized values, "
    "(μ − m)²/(s + ε) + v·(1/√(s + ε) − 1/√(v + ε))², as a sum over channels.",
    threshold=f"Above the change by the statistics of {REFERENCE} samples, which follows from the spread between the "
    "samples, and if t-tests on means and logarithms of variances (standard errors of both sides, Holm's correction "
    "over channels, layers and rules) exclude chance. A warning where the outputs of the model change by more "
    "than in batches of so many samples; else, and for frozen layers, info. Layers that are new are left out "
    "(KN108), as are those whose drift comes from the values of a new layer (KN203).",
    source=f"{REFERENCE_SOURCE}. Wu, Johnson (2021), arXiv:2105.07576, section 3: precise statistics; Li et al. "
    "(2016), arXiv:1603.04779: statistics of another domain.",
    explanation="In evaluation the layer shifts and scales its input otherwise than in training, so that the layers "
    "behind it get what they were not trained on. It comes from data of another domain or another preprocessing, a "
    "momentum that is too small, weights that changed after the statistics, or batches of another kind in training.",
    remedy="Compute the running statistics again from data as in use, with the weights as they are.",
    check=check,
    sick=(_of_other_data, _in_the_middle, _one_channel),
    healthy=(_trained_on_it, _trained_on_other_samples, _new, _constant),
    needs=("data",),
    in_training=False,  # they follow weights that still move, and catch up as the learning rate falls
    tests=_tests,
    fix=by_recalibrating,
)
