"""KN107: some batch norms are in training and others in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._modes import looked_after, trains


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer whose mode differs from the model's, and is not kept so by kn.freeze or by a train() of its own."""
    training = evidence.core.training
    for layer in evidence.layers:
        if not _differs(evidence, layer, training):
            continue
        if training:
            why = "is in evaluation and trains γ and β, while the model is in training"
        else:
            why = "is in training while the model is in evaluation: the batch normalizes"
            why += ", and its running statistics are updated" if layer.updates else ""
        yield RULE.found(
            (layer.path,),
            f"{layer.named} {why}.",
            [f"model.train({training})"],
            evidence={"model in training": training, "layer in training": layer.training},
        )


def _differs(evidence: Evidence, layer: LayerFacts, training: bool) -> bool:
    if layer.held or layer.fixed or layer.training is training or not layer.has_statistics:
        return False
    if training and layer.frozen + layer.trainable and not trains(evidence, layer):  # frozen by hand: KN106
        return False
    return not looked_after(evidence, layer.path)


def fix(model: nn.Module, finding: Finding, evidence: Evidence) -> str:
    """Give the layer the model's mode."""
    layer, training = evidence[finding.layers[0]].module, evidence.core.training
    layer.train(training)
    return f"it was put in {'training' if training else 'evaluation'}, as the model is"


def _model() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), nn.ReLU())


def _part_left_in_training() -> Case:
    model = _model().eval()
    model[1].train()
    return Case(model, ("1.1",))


def _set_by_hand() -> Case:
    model = _model().eval()
    model[0].training = True
    return Case(model, ("0",))


def _part_left_in_evaluation() -> Case:
    model = _model().train()
    model[1].eval()
    return Case(model, ("1.1",))


def _training() -> Case:
    return Case(_model().train())


def _evaluation() -> Case:
    return Case(_model().eval())


def _inside_a_wrapper() -> Case:
    """A wrapper's own mode does not count."""
    wrapped = nn.DataParallel(_model())
    wrapped.module.eval()
    return Case(wrapped)


def _frozen() -> Case:
    from keelnorm.control import freeze

    model = _model()
    freeze(model, where="0")
    return Case(model.train())


def _without_statistics() -> Case:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)).eval()
    model[0].train()
    return Case(model, batches=[torch.zeros(2, 3)])


RULE = Rule(
    id="KN107",
    name="mixed-modes",
    severity="warning",
    summary="A batch norm is in another mode than the model.",
    statistic="The mode of each batch norm, and that of the model inside of wrappers.",
    threshold="Any difference, unless kn.freeze or a train() of the layer or of a module around it keeps it, or the "
    "layer is frozen by hand (KN106).",
    source="torch.nn.Module.train and eval, which set the mode of every submodule.",
    explanation="In evaluation, a layer that was left in training normalizes with the batch and goes on updating its "
    "running statistics, with test data. In training, a layer that was left in evaluation normalizes with old "
    "statistics until the next train().",
    remedy="Call model.train() or model.eval() on the whole model, after all that changes parts of it; to keep a part "
    "frozen, use kn.freeze.",
    check=check,
    sick=(_part_left_in_training, _set_by_hand, _part_left_in_evaluation),
    healthy=(_training, _evaluation, _inside_a_wrapper, _frozen, _without_statistics),
    fix=fix,
)
