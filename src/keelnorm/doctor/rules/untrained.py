"""KN108: a layer evaluates with the running statistics of a new layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule, by_recalibrating
from keelnorm.doctor.rules._examples import at, batches_of, trained


def check(evidence: Evidence) -> Iterator[Finding]:
    """Layers in evaluation whose running mean is 0 and whose variance is 1; one finding if all layers are new."""
    candidates = [layer for layer in evidence.layers if _has_finite_statistics(layer)]
    initial = [layer for layer in candidates if layer.is_initial]
    evaluating = [layer for layer in initial if not layer.uses_batch]
    if len(initial) == len(candidates) and not any(layer.batches for layer in initial):
        if evaluating:
            yield RULE.found(
                [layer.path for layer in evaluating],
                f"No batch norm has seen a batch; {len(evaluating)} in evaluation, with mean 0 and variance 1.",
                ["kn.recalibrate(model, batches)"],
                severity="info",
                evidence={"layers": len(evaluating), "batches": 0},
            )
        return
    for layer in evaluating:
        why = "has seen no batch, and others have" if not layer.batches else f"has counted {layer.batches} batches"
        where = f", where={layer.path!r}" if layer.path else ""
        yield RULE.found(
            (layer.path,),
            f"{layer.named} {why}: it evaluates with mean 0 and variance 1, the values of a new layer.",
            [*_thaw(layer), f"kn.recalibrate(model, batches{where})"],
            evidence={"batches": layer.batches, "layers with statistics": len(candidates) - len(initial)},
        )


def _has_finite_statistics(layer: LayerFacts) -> bool:
    """Whether there are statistics of the layer's input, which are not broken (KN109)."""
    if layer.running_mean is None or layer.running_var is None:
        return False
    return bool((layer.running_mean.isfinite() & layer.running_var.isfinite()).all())


def _thaw(layer: LayerFacts) -> list[str]:
    return [f"kn.unfreeze({layer.code}, affine=False)"] if layer.held else []


def _model() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))


def _all_new() -> Case:
    return Case(_model().eval(), ("0", "2"), batches_of(4, 3))


def _one_new() -> Case:
    """As after load_state_dict(strict=False), with a key that did not fit."""
    model = _model().eval()
    trained(model[0])
    return Case(model, ("2",), batches_of(4, 3))


def _counted_but_new() -> Case:
    model = _model().eval()
    trained(model[0])
    at(model, "2").num_batches_tracked.fill_(100)
    return Case(model, ("2",), batches_of(4, 3))


def _frozen_when_new() -> Case:
    from keelnorm.control import freeze

    model = _model()
    trained(model[2])
    freeze(model, where="0")
    return Case(model, ("0",), batches_of(4, 3))


def _new_in_training() -> Case:
    return Case(_model().train())


def _new_head_in_training() -> Case:
    model = _model().train()
    trained(model[0])
    return Case(model)


def _without_counter() -> Case:
    """As from a checkpoint without num_batches_tracked."""
    model = _model().eval()
    trained(model[0], batches=0)
    trained(model[2], batches=0)
    return Case(model)


RULE = Rule(
    id="KN108",
    name="untrained-statistics",
    severity="warning",
    summary="A batch norm evaluates with the running statistics of a new layer.",
    statistic="Whether the running mean is exactly 0 and the running variance exactly 1 in every channel of a layer "
    "that normalizes with them; num_batches_tracked.",
    threshold="Exact equality in all channels, which no update leaves behind. Info where that is so for all layers of "
    "a model that has seen no batch: it is new. A warning where others have statistics, or batches were counted.",
    source="torch.nn.BatchNorm2d: running_mean is 0 and running_var 1 at the start.",
    explanation="Such a layer normalizes nothing in evaluation. It was left out of a checkpoint (strict=False), never "
    "reached in training, reset, or frozen before its first batch.",
    remedy="Load the right weights, or compute the statistics from data with kn.recalibrate.",
    check=check,
    sick=(_all_new, _one_new, _counted_but_new, _frozen_when_new),
    healthy=(_new_in_training, _new_head_in_training, _without_counter),
    fix=by_recalibrating,
)
