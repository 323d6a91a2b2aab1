"""KN106: a layer's parameters are frozen and its statistics are not, or the reverse, or only until train()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from keelnorm.control.freezing import freeze
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._modes import looked_after, others_train, trains


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer that is frozen by half."""
    for layer in evidence.layers:
        judged = _judged(evidence, layer) if layer.weight is not None or layer.bias is not None else None
        if judged is not None:
            severity, why, option = judged
            where = f", where={layer.path!r}" if layer.path else ""
            yield RULE.found(
                (layer.path,),
                f"{layer.named} {why}.",
                [f"kn.freeze(model{option}{where})"],
                severity=severity,
                evidence={"updates": layer.updates, "trains": trains(evidence, layer), "held": layer.held},
            )


def _judged(evidence: Evidence, layer: LayerFacts) -> tuple[Severity, str, str] | None:
    """Severity, reason, and the option of ``kn.freeze`` that repairs it."""
    training = trains(evidence, layer)
    if layer.updates and not training:
        how = "are not trained by the optimizer" if layer.trainable else "require no gradient"
        why = f"updates its running statistics while its parameters {how}"
        return (
            ("warning", f"{why}: they drift away from what the frozen parameters were trained with", "")
            if (others_train(evidence, layer))
            else None
        )
    if (layer.held or layer.fixed) and training:
        return "info", "trains γ and β while its running statistics are frozen", ", statistics=False"
    by_hand = evidence.core.training and not layer.training and not layer.held and not layer.fixed
    if by_hand and not training and not looked_after(evidence, layer.path) and others_train(evidence, layer):
        why = "is frozen by eval() alone: the next model.train() lets its running statistics be updated again"
        return "warning", why, ""
    return None


def fix(model: nn.Module, finding: Finding, evidence: Evidence) -> str:
    """Freeze what is not frozen yet."""
    layer = evidence[finding.layers[0]]
    judged = _judged(evidence, layer)
    assert judged is not None
    statistics = not judged[2]
    freeze(layer.module, statistics=statistics)
    return "its running statistics and parameters were frozen" if statistics else "its parameters were frozen"


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)
    )


def _frozen_backbone() -> Case:
    model = _model()
    model[0].requires_grad_(False)
    return Case(model, ("0.1",))


def _not_in_the_optimizer() -> Case:
    model = _model()
    parameters = [value for name, value in model.named_parameters() if not name.startswith("0.1")]
    return Case(model, ("0.1",), optimizer=torch.optim.SGD(parameters, lr=0.1))


def _rate_of_zero() -> Case:
    model = _model()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}]
    return Case(model, ("0.1",), optimizer=torch.optim.SGD(groups, lr=0.1))


def _by_eval_alone() -> Case:
    model = _model()
    model[0].requires_grad_(False).eval()
    return Case(model, ("0.1",))


def _statistics_alone() -> Case:
    model = _model()
    freeze(model, affine=False, where="3")
    return Case(model, ("3",))


def _case(change: Callable[[nn.Sequential], object]) -> Case:
    model = _model()
    change(model)
    return Case(model)


def _nothing_frozen() -> Case:
    return _case(lambda model: model.train())


def _wholly_frozen() -> Case:
    def change(model: nn.Sequential) -> None:
        model[0].requires_grad_(False)
        freeze(model, where="0")
        model.train()

    return _case(change)


def _for_inference() -> Case:
    return _case(lambda model: model.requires_grad_(False).eval())


def _teacher() -> Case:
    """Nothing trains by gradients: an average of another model, which is kept in training mode."""
    return _case(lambda model: model.requires_grad_(False).train())


def _looked_after() -> Case:
    """A module whose own train() keeps its batch norms in evaluation."""

    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> Backbone:
            super().train(mode)
            self[1].eval()
            return self

    head = nn.Linear(4, 2)
    backbone = Backbone(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).requires_grad_(False)
    return Case(nn.Sequential(backbone, head).train())


def _at_the_start_of_a_warm_up() -> Case:
    model = _model()
    return Case(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))


RULE = Rule(
    id="KN106",
    name="half-frozen",
    severity="warning",
    summary="A batch norm is frozen by half, or only until train() is called.",
    statistic="Whether γ and β train (they require a gradient, and the optimizer has them), whether the running "
    "statistics are updated, and who keeps the layer's mode.",
    threshold="A warning where γ and β are frozen, other parameters train, and the running statistics are updated, now "
    "or after the next train(). The reverse, training γ and β with frozen statistics, is info: detectors are "
    "fine-tuned so. Nothing is said where no parameter of the model trains, and where a module around the layer has "
    "its own train().",
    source="torch.nn.Module.train; He et al. (2015), arXiv:1512.03385, appendix A: batch norms are fixed in "
    "fine-tuning.",
    explanation="requires_grad_(False) freezes γ and β, not the running statistics: every forward in training mode "
    "updates them, and evaluation drifts away from the pretrained network. eval() freezes the statistics until someone "
    "calls model.train(), as training loops do every epoch.",
    remedy="kn.freeze(model, where=...) freezes both, whatever train() asks for later.",
    check=check,
    sick=(_frozen_backbone, _not_in_the_optimizer, _rate_of_zero, _by_eval_alone, _statistics_alone),
    healthy=(_nothing_frozen, _wholly_frozen, _for_inference, _teacher, _looked_after, _at_the_start_of_a_warm_up),
    fix=fix,
)
