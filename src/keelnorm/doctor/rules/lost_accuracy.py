"""KN202: the model predicts worse with its running statistics than with those of the data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule, by_recalibrating
from keelnorm.doctor.rules._drift import drifted
from keelnorm.doctor.rules._examples import at, settled
from keelnorm.doctor.rules._tests import sign_test


def check(evidence: Evidence) -> Iterator[Finding]:
    """One finding, at all layers whose statistics have drifted."""
    compared = None if evidence.data is None else evidence.data.against_true
    if compared is None or compared.right is None or compared.right_then is None or compared.lost <= compared.won:
        return
    layers = [layer for layer, _ in drifted(evidence, evidence.layers) if not layer.fixed]
    if not layers:
        return
    thaw = [f"kn.unfreeze({layer.code}, affine=False)" for layer in layers if layer.held]
    yield RULE.found(
        (layer.path for layer in layers),
        f"The model is right in {100 * compared.right:.1f} % of the samples, and would be in "
        f"{100 * compared.right_then:.1f} % with the statistics of these data ({compared.lost} predictions lost, "
        f"{compared.won} won).",
        [*thaw, "kn.recalibrate(model, batches)"],
        evidence={
            "accuracy": compared.right, "accuracy with true statistics": compared.right_then,
            "lost": compared.lost, "won": compared.won, "layers": len(layers),
        },
        p_value=sign_test(compared.lost, compared.won),
    )  # fmt: skip


def _tests(evidence: Evidence) -> int:
    return 1


def _data() -> list[tuple[Tensor, Tensor]]:
    """Four classes, each with a mean of its own."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(6):
        labels = torch.randint(4, (32,), generator=generator)
        means = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [-2.0, -2.0, 0]])
        found.append((means[labels] + 0.3 * torch.randn(32, 3, generator=generator), labels))
    return found


def _classifier() -> nn.Sequential:
    """It predicts the class whose mean is next."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    batches = _data()
    settled(model, [x for x, _ in batches], rounds=10)
    with torch.no_grad():
        x, labels = torch.cat([x for x, _ in batches]), torch.cat([labels for _, labels in batches])
        normal = at(model, "0").eval()(x)
        means = torch.stack([normal[labels == k].mean(0) for k in range(4)])
        at(model, "1").weight.copy_(means)
        at(model, "1").bias.copy_(-0.5 * means.square().sum(1))
    return model.train()


def _shifted() -> Case:
    model = _classifier()
    at(model, "0").running_mean += torch.tensor([3.0, -3.0, 0.0])
    return Case(model, ("0",), _data())


def _other_preprocessing() -> Case:
    return Case(_classifier().eval(), ("0",), [(x / 4 + 1, labels) for x, labels in _data()])


def _right() -> Case:
    return Case(_classifier(), batches=_data())


def _without_labels() -> Case:
    model = _classifier()
    at(model, "0").running_mean += 3.0
    return Case(model, batches=[x for x, _ in _data()])


RULE = Rule(
    id="KN202",
    name="lost-accuracy",
    severity="error",
    summary="The model predicts worse with its running statistics than with those of the data.",
    statistic="The samples that are predicted rightly with the data's statistics and wrongly in evaluation, and the "
    "reverse. Labels are a batch's second element, or its `labels`.",
    threshold="McNemar's test of the two numbers, corrected by Holm's method over all tests, where a layer has drifted "
    "by more than the statistics of 16 samples do (KN201).",
    source="McNemar (1947), Psychometrika 12; Wu, Johnson (2021), arXiv:2105.07576, section 3.",
    explanation="It is the running statistics that make evaluation worse, not overfitting: the same weights predict "
    "better with the moments of the very data.",
    remedy="Compute the running statistics again. If the data are another domain, say so in a report: kn.adapt.",
    check=check,
    sick=(_shifted, _other_preprocessing),
    healthy=(_right, _without_labels),
    needs=("data",),
    in_training=False,
    tests=_tests,
    fix=by_recalibrating,
)
