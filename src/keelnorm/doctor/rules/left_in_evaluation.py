"""KN306: a training step leaves layers in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import counted
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all layers whose mode a step has changed."""
    step = evidence.step
    left = [] if step is None else [layer.path for layer in evidence.layers if layer.path in step.left_evaluating]
    if left:
        yield RULE.found(
            left,
            f"After the loss of a training step, {counted(len(left))} of {len(evidence.layers)} are in evaluation: "
            "from the next step on they normalize with running statistics that nothing updates.",
            [
                "evaluating = loss",
                "def loss(model, batch):  # or call train() where the evaluation inside the step ends",
                "    value = evaluating(model, batch)\n    model.train()\n    return value",
            ],
            evidence={"layers": len(left)},
        )


def _model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def _mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _with_validation(model: nn.Module, batch: Tensor) -> Tensor:
    """Evaluates in between, and does not go back."""
    loss = _mean_square(model, batch)
    model.eval()
    with torch.no_grad():
        model(batch)
    return loss


def _with_validation_and_back(model: nn.Module, batch: Tensor) -> Tensor:
    loss = _with_validation(model, batch)
    model.train()
    return loss


def _part_of_it(model: nn.Module, batch: Tensor) -> Tensor:
    loss = _mean_square(model, batch)
    at(model, "1").eval()
    return loss


def _whole() -> Case:
    return Case(_model(), ("1",), batches_of(16, 3), loss=_with_validation)


def _part() -> Case:
    return Case(_model(), ("1",), batches_of(16, 3), loss=_part_of_it)


def _usual() -> Case:
    return Case(_model(), batches=batches_of(16, 3), loss=_mean_square)


def _back() -> Case:
    return Case(_model(), batches=batches_of(16, 3), loss=_with_validation_and_back)


RULE = Rule(
    id="KN306",
    name="left-in-evaluation",
    severity="warning",
    summary="A training step leaves layers in evaluation.",
    statistic="The mode of each layer before and after the loss of a training step is computed.",
    threshold="Training before, evaluation after.",
    source="torch.nn.Module.eval: it sets the mode of all modules, until train() sets it back.",
    explanation="An evaluation inside the step, or a metric that calls eval(), is forgotten: all further steps train "
    "with running statistics that stay as they are, and without dropout.",
    remedy="Call train() where the evaluation ends.",
    check=check,
    sick=(_whole, _part),
    healthy=(_usual, _back),
    needs=("step",),
    in_training=False,
)
