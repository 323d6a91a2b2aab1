"""KN208: channels of a layer's input do not vary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, data_of, network
from keelnorm.engine.torch_internals import ConvBase


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer with channels whose variance over the data is below eps."""
    for layer in evidence.layers:
        true = None if evidence.data is None else evidence.data.moments(layer.path)
        if true is None or true.values < 2:
            continue
        constant = true.var < layer.eps
        number, channels = int(constant.sum()), constant.numel()
        if not number:
            continue
        where = "all" if number == channels else f"{number} of {channels}"
        yield RULE.found(
            (layer.path,),
            f"The input of {layer.named} hardly varies in {where} channels: its variance is at most "
            f"{float(true.var[constant].max()):.2g}, below eps, {layer.eps:g}.",
            _remedy(layer, constant),
            severity="warning" if number == channels else "info",
            evidence={
                "channels": number, "of": channels, "largest variance": float(true.var[constant].max()),
                "threshold": layer.eps,
            },
        )  # fmt: skip


def _remedy(layer: LayerFacts, constant: torch.Tensor) -> list[str]:
    """New weights for what makes the channels, where that is a layer; else prune."""
    before = None if layer.beside is None or len(layer.beside.before) != 1 else layer.beside.before[0]
    index = ":" if bool(constant.all()) else str(constant.nonzero().flatten().tolist())
    if before is None or before.path is None or not isinstance(before.module, ConvBase | nn.Linear):
        return [f"# leave channels {index} of what {layer.named} normalizes out of the data or of the network"]
    return [
        f"weight = model.get_submodule({before.path!r}).weight  # or prune these channels",
        f"with torch.no_grad():\n    weight[{index}] = nn.init.kaiming_normal_(torch.empty_like(weight[{index}]))",
    ]


def _some() -> Case:
    model = network()
    with torch.no_grad():
        at(model, "0").weight[[1, 4]] = 0.0
    return Case(model, ("1",), data_of())


def _all() -> Case:
    model = network()
    with torch.no_grad():
        at(model, "3").weight.mul_(1e-8)
    return Case(model, ("4",), data_of())


def _varying() -> Case:
    return Case(network(), batches=data_of())


def _small_but_above_eps() -> Case:
    return Case(nn.Sequential(nn.BatchNorm2d(3, eps=1e-12)), batches=[1e-3 * batch for batch in data_of()])


RULE = Rule(
    id="KN208",
    name="constant-channels",
    severity="warning",
    summary="Channels of a layer's input are constant, or nearly so.",
    statistic="The variance of each channel of the layer's input over the data.",
    threshold="Below eps: the normalized values then have a variance below one half, v/(v + ε), and 0 where nothing "
    "varies. Info where it is some channels, as in many trained networks; a warning where it is all.",
    source="Ioffe, Szegedy (2015), arXiv:1502.03167, algorithm 1: the constant ε in the variance.",
    explanation="The channel passes on β and costs as much as others. Weights in front are 0, or a ReLU there never "
    "fires; a whole layer like this is scaled wrongly, as by weights of another unit.",
    remedy="Give what makes the channels new weights, scale the data, or prune.",
    check=check,
    sick=(_some, _all),
    healthy=(_varying, _small_but_above_eps),
    needs=("data",),
)
