"""KN302: a training step gives NaN or infinite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """The place where the first NaN or infinity arises: in the forward from the front, else in the backward."""
    step = evidence.step
    if step is None:
        return
    order = [layer.path for layer in evidence.layers if layer.path in step.calls]
    forward = [path for path in order if path in step.broken_inputs]
    backward = [path for path in order if not math.isfinite(step.gradients.get(path, 0.0))]
    if forward:
        where, why = forward[0], f"In training mode, the input of {evidence[forward[0]].named} is NaN or infinite"
    elif step.loss is not None and not math.isfinite(step.loss):
        where, why = None, f"The loss of a training step is {step.loss:g}, and the inputs of all batch norms are finite"
    elif backward:
        where = backward[-1]
        why = (
            f"The inputs of all batch norms are finite, and the gradient at {evidence[where].named} is NaN or "
            "infinite, the first in the order of the backward"
        )
    else:
        return
    yield RULE.found(
        [] if where is None else [where],
        f"{why}.",
        [
            "with torch.autograd.set_detect_anomaly(True):  # names the operation that made it\n    pass  # a step",
            "for name, p in model.named_parameters():  # or load the last finite checkpoint\n"
            "    if not p.isfinite().all():\n        nn.init.normal_(p.data, std=0.01)",
            "finite = loss",
            "def loss(model, batch):  # or clip, scale, or leave the batch out\n"
            "    value = finite(model, batch)\n    return value if value.isfinite() else value.detach().nan_to_num()"
            " + 0 * sum(p.sum() for p in model.parameters())",
        ],
        evidence={"loss": step.loss, "inputs": len(forward), "gradients": len(backward)},
    )


def _model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Linear(4, 1),
        )


def _mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _log(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss that is -inf or NaN where the output is not positive."""
    loss: Tensor = model(batch).log().mean()
    return loss


def _in_a_weight() -> Case:
    model = _model()
    with torch.no_grad():
        at(model, "3").weight[0, 0] = float("nan")
    return Case(model, ("4",), batches_of(16, 3), loss=_mean_square)


def _in_the_loss() -> Case:
    return Case(_model(), (), batches_of(16, 3), loss=_log)


def _finite() -> Case:
    return Case(_model(), batches=batches_of(16, 3), loss=_mean_square)


RULE = Rule(
    id="KN302",
    name="broken-step",
    severity="error",
    summary="A training step gives NaN or infinite gradients.",
    statistic="The inputs of all layers in training mode, the loss, and the gradients of the layers' outputs.",
    threshold="Not finite. The first place counts: the first layer in the forward whose input is; else the loss; else "
    "the last layer in the order of the forward whose gradient is.",
    source="IEEE 754: sums with NaN are NaN.",
    explanation="One step with such gradients makes every parameter NaN. Evaluation may still look right, since it "
    "runs with other statistics.",
    remedy="Look at the operation behind the layer, or in front of it, that the finding names: a logarithm or a root "
    "of 0, a division, half precision.",
    check=check,
    sick=(_in_a_weight, _in_the_loss),
    healthy=(_finite,),
    needs=("step",),
)
