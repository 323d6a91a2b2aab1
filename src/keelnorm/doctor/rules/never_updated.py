"""KN305: a training step does not update running statistics that evaluation will use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """Layers whose parameters train, and that a step does not call, or calls without counting the batch."""
    step = evidence.step
    if step is None:
        return
    for layer in evidence.layers:
        if layer.held or layer.fixed or not layer.tracks or not layer.has_statistics or layer.is_variant:
            continue
        if layer.path not in step.calls:
            why = "A training step does not call"
        elif step.updates[layer.path] == 0 and layer.trainable and layer.training:
            why = "A training step runs, and does not update the running statistics of,"
        else:
            continue
        yield RULE.found(
            (layer.path,),
            f"{why} {layer.named}: its running statistics stay as they are.",
            [
                f"{layer.code}.requires_grad_(False)",
                f"kn.freeze(model, where={layer.path!r})  # if it is meant; else call it, in training mode"
                if layer.path
                else "kn.freeze(model)",
            ],
            severity="info" if layer.path not in step.calls else "warning",
            evidence={"calls": step.calls.get(layer.path, 0), "updates": step.updates[layer.path]},
        )


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.first, self.second = (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(self.body(x))
        return y


class _Stubborn(nn.Module):
    """It evaluates its batch norm, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        mode, self.norm.training = self.norm.training, False
        y = self.norm(x)
        self.norm.training = mode
        made: Tensor = self.out(y)
        return made


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _second_head() -> Case:
    return Case(_TwoHeads(), ("second.0",), batches_of(16, 3), loss=_loss)


def _evaluating() -> Case:
    return Case(_Stubborn(), ("norm",), batches_of(16, 3), loss=_loss)


def _usual() -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    return Case(model, batches=batches_of(16, 3), loss=_loss)


RULE = Rule(
    id="KN305",
    name="never-updated",
    severity="warning",
    summary="A training step does not update running statistics that evaluation will use.",
    statistic="Calls of each layer in a training step, and `num_batches_tracked` before and after.",
    threshold="No call, which is info, since another step may call it; or calls without an update of a layer that is "
    "in training mode and has parameters that train, a warning. Frozen layers are left out.",
    source="The definition of the running statistics: each training batch updates them.",
    explanation="Evaluation uses statistics that nothing brings up to date, while the weights in front change.",
    remedy="Call the layer in training mode, or freeze it whole.",
    check=check,
    sick=(_second_head, _evaluating),
    healthy=(_usual,),
    needs=("step",),
    in_training=False,
)
