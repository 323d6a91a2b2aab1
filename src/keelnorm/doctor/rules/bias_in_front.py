"""KN101: the layer in front of a batch norm has a bias, which the batch norm subtracts again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.evidence.neighbors import Neighbor
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.engine.torch_internals import ConvBase


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each batch norm whose input comes straight from a convolution or linear layer with a bias."""
    for layer in evidence.layers:
        source = _biased(layer)
        if source is None or source.module is None or layer.held or layer.fixed or layer.own_scale is not None:
            continue
        bias = source.module.bias
        assert isinstance(bias, torch.Tensor)
        yield RULE.found(
            (layer.path,),
            f"{source.name} has a bias of {bias.numel()} values, which {layer.named} behind it subtracts again.",
            _remedy(layer, source),
            evidence={"values": bias.numel(), "in front": source.path},
        )


def _biased(layer: LayerFacts) -> Neighbor | None:
    """The layer in front, if it has a bias that nothing but this batch norm sees."""
    if layer.beside is None or not layer.beside.alone or len(layer.beside.before) != 1:
        return None
    [source] = layer.beside.before
    module = source.module
    is_plain = source.function.startswith(("conv", "linear")) and isinstance(module, ConvBase | nn.Linear)
    return source if is_plain and module is not None and module.bias is not None else None


def _remedy(layer: LayerFacts, source: Neighbor) -> list[str]:
    lines = [f"layer, norm = model.get_submodule({source.path!r}), {layer.code}"]
    if layer.has_statistics:
        lines.append("norm.running_mean -= layer.bias.detach()  # evaluation stays as it is")
    return [*lines, "layer.bias = None  # before the optimizer is made; in the model's code: bias=False"]


def _convolution() -> Case:
    return Case(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), ("1",))


def _linear_with_data() -> Case:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.norm(self.linear(x)).relu()

    return Case(Block(), ("norm",), batches=[torch.zeros(4, 3)])


def _no_bias() -> Case:
    return Case(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))


def _bias_that_counts() -> Case:
    """The convolution's result is used twice, and a ReLU stands between the other two."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)
            self.one, self.two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.first(x)
            return self.one(y) + y + self.two(self.second(x).relu())

    return Case(Block(), batches=[torch.zeros(2, 3, 4)])


RULE = Rule(
    id="KN101",
    name="bias-in-front",
    severity="info",
    summary="A convolution or linear layer in front of a batch norm has a bias.",
    statistic="Whether the layer that makes the batch norm's input has a bias, and nothing else reads that input.",
    threshold="Wherever that is so: x + b has the batch mean mean(x) + b, so the difference from the mean does not "
    "depend on b.",
    source="Ioffe, Szegedy (2015), arXiv:1502.03167, section 3.2: the bias can be ignored, β takes its role.",
    explanation="In training, the batch norm subtracts the batch mean and the bias with it. The bias has no effect on "
    "the output and a gradient of 0, up to rounding; it costs memory, and a bit of time. Nothing is wrong, and "
    "published networks have it.",
    remedy="Build the layer with bias=False. In a trained model, subtract the bias from the running mean and drop it.",
    check=check,
    sick=(_convolution, _linear_with_data),
    healthy=(_no_bias, _bias_that_counts),
    needs=("neighbors",),
)
