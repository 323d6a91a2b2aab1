"""KN116: an averaged model has the running statistics of the last model, not of the average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts, counted
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule, by_recalibrating
from keelnorm.doctor.rules._examples import batches_of, trained

#: A model that is averaged at least every tenth step is an average of steps. One that is averaged once an epoch has
#: more batches in an epoch than that.
STEPS = 10


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each averaged model. It keeps the running statistics of the last model, until update_bn or recalibrate is called.

    Both set the number of batches to theirs. Otherwise it is that of training, at least one for each averaged model.
    """
    for path, module in evidence.model.named_modules():
        if not isinstance(module, AveragedModel) or module.use_buffers:
            continue
        averaged, inside = int(module.n_averaged), set(module.modules())
        layers = [layer for layer in evidence.layers if layer.module in inside and _is_trainings(layer, averaged)]
        if averaged < 2 or not layers:
            continue
        batches = max(layer.batches or 0 for layer in layers)
        sure = batches <= STEPS * averaged
        name = f"The averaged model {path!r}" if path else "The averaged model"
        doubt = "" if sure else ", unless update_bn was called since"
        yield RULE.found(
            (layer.path for layer in layers),
            f"{name} has the mean of {averaged} models as weights, and the running statistics of the last one in "
            f"{counted(len(layers))}{doubt}.",
            [f"kn.recalibrate({f'model.get_submodule({path!r})' if path else 'model'}, batches)"],
            severity="warning" if sure else "info",
            evidence={"models": averaged, "batches": batches, "threshold": STEPS * averaged},
        )


def _is_trainings(layer: LayerFacts, averaged: int) -> bool:
    return layer.running_mean is not None and layer.batches is not None and layer.batches >= averaged


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())
    trained(model[1])
    return model


def _average(models: int = 50, *, use_buffers: bool = False) -> AveragedModel:
    averaged = AveragedModel(_model(), use_buffers=use_buffers)
    for _ in range(models):
        averaged.update_parameters(_model())
    return averaged.eval()


def _every_other_step() -> Case:
    return Case(_average(), ("module.1",), batches_of(4, 3))


def _once_an_epoch() -> Case:
    return Case(_average(4), ("module.1",), batches_of(4, 3))


def _inside_another() -> Case:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = _model(), _average()

        def forward(self, x: torch.Tensor) -> Any:
            return self.student(x)

    return Case(Pair(), ("teacher.module.1",), batches_of(4, 3))


def _statistics_renewed() -> Case:
    averaged = _average()
    update_bn(batches_of(4, 3), averaged)
    return Case(averaged)


def _statistics_averaged() -> Case:
    return Case(_average(use_buffers=True))


def _plain() -> Case:
    return Case(_model().eval(), batches=batches_of(4, 3))


RULE = Rule(
    id="KN116",
    name="averaged-weights",
    severity="warning",
    summary="An averaged model has the running statistics of the last model, not of the average.",
    statistic="Whether an AveragedModel with use_buffers=False has averaged several models, and num_batches_tracked is "
    "still at least their number.",
    threshold="update_bn and kn.recalibrate set num_batches_tracked to the number of their batches. Without them it is "
    "that of training, at least one for each averaged model. A model that was averaged at least every tenth step then "
    "gives a warning. One that was averaged once an epoch has more batches than that in either case, and it can't be "
    "seen whether update_bn was called: info.",
    source="Izmailov et al. (2018), arXiv:1803.05407, section 3.2; torch.optim.swa_utils.update_bn.",
    explanation="Running statistics are those of the inputs that the last model's weights made. The average of the "
    "weights makes others, of smaller variance in the layers behind; evaluation can fall to chance although the "
    "weights are good.",
    remedy="kn.recalibrate(model, batches), after the last update of the average.",
    check=check,
    sick=(_every_other_step, _once_an_epoch, _inside_another),
    healthy=(_statistics_renewed, _statistics_averaged, _plain),
    fix=by_recalibrating,
)
