"""KN118: the weights in front of a batch norm were pruned or quantized, perhaps after its statistics were taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import batches_of, trained

_INTEGERS = (torch.int8, torch.uint8, torch.qint8, torch.quint8)


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each batch norm that evaluates behind a layer with compressed weights."""
    for layer in evidence.layers:
        if layer.beside is None or len(layer.beside.before) != 1 or not _evaluates(layer):
            continue
        [source] = layer.beside.before
        if source.module is None:
            continue
        how, then = "", ""
        if _is_pruned(source.module):
            how = "pruned"
            then = f"torch.nn.utils.prune.remove(model.get_submodule({source.path!r}), 'weight')"
        elif evidence.batches is None and _is_quantized(source.module):
            how, then = "quantized", "diagnosis = kn.diagnose(model, batches)  # compares the statistics with the data"
        if how:
            where = f", where={layer.path!r}" if layer.path else ""
            yield RULE.found(
                (layer.path,),
                f"The weights of {source.name}, in front of {layer.named}, are {how}: the running statistics may be "
                "those of the weights before.",
                [f"kn.recalibrate(model, batches{where})", then],
                evidence={"weights": how, "in front": source.path},
            )


def _evaluates(layer: LayerFacts) -> bool:
    return not layer.uses_batch and not layer.is_initial and layer.running_mean is not None


def _is_pruned(source: nn.Module) -> bool:
    return hasattr(source, "weight_orig") and hasattr(source, "weight_mask")


def _is_quantized(source: nn.Module) -> bool:
    weight: Any = getattr(source, "weight", None)
    weight = weight() if callable(weight) and not isinstance(weight, torch.Tensor) else weight
    if not isinstance(weight, torch.Tensor):
        return False
    return weight.dtype in _INTEGERS or type(weight).__module__.partition(".")[0] == "torchao"


def _model(first: nn.Module | None = None) -> nn.Sequential:
    model = nn.Sequential(first or nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())
    trained(model[1])
    return model.eval()


class _Quantized(nn.Module):
    """A linear layer with weights of 8 bits, as packages for quantization make them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.eye(4, 3).mul(100).to(torch.int8))

    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def _pruned() -> Case:
    model = _model()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return Case(model, ("1",), batches_of(4, 3))


def _quantized() -> Case:
    return Case(_model(_Quantized()), ("1",), example=batches_of(4, 3)[0])


def _plain() -> Case:
    return Case(_model(), batches=batches_of(4, 3))


def _in_training() -> Case:
    """While training goes on, the statistics follow the weights."""
    model = _model()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return Case(model.train(), batches=batches_of(4, 3))


RULE = Rule(
    id="KN118",
    name="compressed-weights",
    severity="info",
    summary="The weights in front of a batch norm are pruned or quantized.",
    statistic="Whether the layer in front has a pruning mask of torch.nn.utils.prune, or integer weights, and the "
    "batch norm evaluates.",
    threshold="Wherever that is so. It is info, because it can't be seen without data whether the statistics were "
    "taken before or after. Of quantized weights it says nothing where there are batches, with which other rules "
    "compare the statistics.",
    source="Li et al. (2020), EagleEye, arXiv:2007.02491: recalibrated statistics decide how good a pruned network is; "
    "Nagel et al. (2019), arXiv:1906.04721, section 3.2: quantization shifts means.",
    explanation="Running statistics are those of the inputs that the old weights made. Pruned weights make a smaller "
    "variance, and quantized ones shift the mean.",
    remedy="kn.recalibrate(model, batches), after the last change of the weights.",
    check=check,
    sick=(_pruned, _quantized),
    healthy=(_plain, _in_training),
    needs=("neighbors",),
)
