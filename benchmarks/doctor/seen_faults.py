"""Faults that the rules were written for: each rule has one or more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from benchmarks.doctor.fault import Batch, Fault, Patient
from keelnorm.engine.torch_internals import BatchNormBase

Put = Callable[[Patient, str], set[str]]


def _one(change: Callable[[Any, Patient], object]) -> Put:
    """A fault of the layer at the path."""

    def put(patient: Patient, path: str) -> set[str]:
        with torch.no_grad():
            change(patient.model.get_submodule(path), patient)
        return {path}

    return put


def _with_data(change: Callable[[list[Batch]], list[Batch]]) -> Put:
    def put(patient: Patient, path: str) -> set[str]:
        patient.batches = change(patient.batches)
        return set()

    return put


def _momentum(value: float) -> Put:
    return _one(lambda layer, _: setattr(layer, "momentum", value))


def _sorted_by_class(batches: list[Batch]) -> list[Batch]:
    x, y = (torch.cat([batch[k] for batch in batches]) for k in (0, 1))
    order = y.argsort()
    return list(zip(x[order].split(32), y[order].split(32), strict=True))


def _smaller(size: int) -> Callable[[list[Batch]], list[Batch]]:
    return lambda batches: [part for x, y in batches for part in zip(x.split(size), y.split(size), strict=True)]


def _darker(batches: list[Batch]) -> list[Batch]:
    return [(0.4 * x - 1.0, y) for x, y in batches]


def _a_last_one(batches: list[Batch]) -> list[Batch]:
    x, y = batches[0]
    return [*batches, (x[:1], y[:1])]


def _broken_pixel(batches: list[Batch]) -> list[Batch]:
    x, y = batches[1]
    x = x.clone()
    x[3, 0, 4, 4] = float("nan")
    return [batches[0], (x, y), *batches[2:]]


def _too_bright(batches: list[Batch]) -> list[Batch]:
    x, y = batches[0]
    x = x.clone()
    x[5] *= 500
    return [(x, y), *batches[1:]]


def _put_back(layer: Any, patient: Patient) -> None:
    layer.reset_running_stats()


def _few_updates(patient: Patient, path: str) -> set[str]:
    """A layer that was put in late: it has seen a few batches."""
    layer: Any = patient.model.get_submodule(path)
    layer.reset_running_stats()
    with torch.no_grad():
        for x, _ in patient.batches[:4]:
            patient.model(x)
    return {path}


def _other_weights(patient: Patient, path: str) -> set[str]:
    """The convolutions were exchanged, and the statistics are those of the old ones."""
    for module in patient.model.modules():
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.mul_(1 + 0.6 * torch.randn(module.weight.shape[0], 1, 1, 1))
    return set()


def _average(patient: Patient, path: str) -> set[str]:
    averaged = AveragedModel(patient.model)
    other = copy.deepcopy(patient.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.abs().mean())
    averaged.update_parameters(patient.model)
    averaged.update_parameters(other)
    patient.model = averaged.eval()
    return set()


class _Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return made


def _checkpointed(patient: Patient, path: str) -> set[str]:
    patient.model = _Checkpointed(patient.model)
    return set()


def _in_parts(patient: Patient, path: str) -> set[str]:
    """Accumulation over four parts of a batch."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        parts = zip(batch[0].chunk(4), batch[1].chunk(4), strict=True)
        return torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in parts]).mean()

    patient.loss = loss
    return set()


def _nan_loss(patient: Patient, path: str) -> set[str]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = (model(batch[0]).softmax(1) - 1).log().mean()
        return value

    patient.loss = loss
    return set()


def _decay(patient: Patient, path: str) -> set[str]:
    patient.optimizer = torch.optim.SGD(patient.model.parameters(), lr=0.05, weight_decay=0.05)
    return set()


def _frozen_backbone(patient: Patient, path: str) -> set[str]:
    """All but the last layer with parameters, as in fine-tuning."""
    patient.model.requires_grad_(False)
    *_, last = (module for module in patient.model.modules() if module._parameters)
    last.requires_grad_(True)
    return set()


def _dead(layer: Any, patient: Patient) -> None:
    layer.weight.zero_()
    layer.bias.add_(0.1)


def _far_below(layer: Any, patient: Patient) -> None:
    layer.bias.fill_(-30.0)


def _weight_in_front(value: float) -> Put:
    def put(patient: Patient, path: str) -> set[str]:
        """The last layer that makes values in front of the batch norm, in the order of registration."""
        before: nn.Conv2d | None = None
        found = ""
        for name, module in patient.model.named_modules():
            if isinstance(module, nn.Conv2d):
                before = module
            elif isinstance(module, BatchNormBase) and before is not None and len(before.weight) == module.num_features:
                found = name
                if name == path:
                    break
        assert before is not None
        with torch.no_grad():
            before.weight.mul_(value)
        return {found}

    return put


FAULTS = [
    Fault("momentum of Keras", _momentum(0.99), "momentum"),
    Fault("momentum 1", _momentum(1.0), "momentum"),
    Fault("momentum 0", _momentum(0.0), "momentum"),
    Fault("momentum negative", _momentum(-0.1), "momentum"),
    Fault("eps of another unit", _one(lambda layer, _: setattr(layer, "eps", 10.0)), "eps"),
    Fault("eps 0", _one(lambda layer, _: setattr(layer, "eps", 0.0)), "eps"),
    Fault("no running statistics", _one(lambda layer, _: setattr(layer, "track_running_stats", False)), "statistics"),
    Fault("parameters frozen alone", _one(lambda layer, _: layer.requires_grad_(False)), "half frozen"),
    Fault("backbone frozen alone", _frozen_backbone, "half frozen"),
    Fault("one layer in evaluation", _one(lambda layer, _: layer.eval()), "mixed modes"),
    Fault("NaN in a running mean", _one(lambda layer, _: layer.running_mean[0].fill_(float("nan"))), "statistics"),
    Fault("a negative variance", _one(lambda layer, _: layer.running_var[0].fill_(-1.0)), "broken statistics"),
    Fault("a variance of 0", _one(lambda layer, _: layer.running_var.zero_()), "broken statistics"),
    Fault("γ is NaN", _one(lambda layer, _: layer.weight[0].fill_(float("nan"))), "broken parameters"),
    Fault("γ of 0", _one(_dead), "dead channels"),
    Fault("β far below 0", _one(_far_below), "saturation, or no output"),
    Fault("half precision", _one(lambda layer, _: layer.half()), "half precision"),
    Fault("decay of γ and β", _decay, "weight decay"),
    Fault("an average without statistics of its own", _average, "averaged weights"),
    Fault("a layer with the statistics of a new one", _one(_put_back), "statistics away from the data's"),
    Fault("a layer that saw four batches", _few_updates, "unsettled statistics"),
    Fault("a running mean that was shifted", _one(lambda layer, _: layer.running_mean.add_(layer.running_var.sqrt())),
          "statistics away from the data's"),
    Fault("a running variance four times as large", _one(lambda layer, _: layer.running_var.mul_(4)),
          "statistics away from the data's"),
    Fault("other weights in front of all", _other_weights, "statistics away from the data's"),
    Fault("darker data", _with_data(_darker), "statistics away from the data's"),
    Fault("data sorted by class", _with_data(_sorted_by_class), "unlike batches"),
    Fault("batches of 2", _with_data(_smaller(2)), "small batches"),
    Fault("a last batch of one", _with_data(_a_last_one), "the last batch"),
    Fault("NaN in a picture", _with_data(_broken_pixel), "broken inputs"),
    Fault("a picture five hundred times as bright", _with_data(_too_bright), "a dominating sample"),
    Fault("no weights in front", _weight_in_front(0.0), "constant channels"),
    Fault("a checkpoint around the model", _checkpointed, "updates in the backward"),
    Fault("accumulation over parts", _in_parts, "several updates"),
    Fault("a loss of NaN", _nan_loss, "a broken step"),
]  # fmt: skip
