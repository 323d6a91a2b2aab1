"""KN114: running statistics or parameters have half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule

_STATISTICS = ("running_mean", "running_var")


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer with values in float16 or bfloat16 that training rounds away."""
    for layer in evidence.layers:
        halves = {name: dtype for name, dtype in layer.dtypes.items() if dtype in (torch.float16, torch.bfloat16)}
        if not halves or layer.fixed:
            continue
        statistics = [name for name in halves if name in _STATISTICS]
        parameters = [name for name in halves if name in layer.trainable]
        dtype = str(next(iter(halves.values()))).removeprefix("torch.")
        trained = evidence.core.training or evidence.optimizer is not None
        lost = (layer.updates and statistics) or (trained and parameters)
        why = (
            _why(layer, torch.finfo(next(iter(halves.values()))).eps, statistics)
            if lost
            else "as is usual in inference"
        )
        yield RULE.found(
            (layer.path,),
            f"{layer.named} has {', '.join(_words(halves))} in {dtype}: {why}.",
            [f"{layer.code}.float()  # autocast and half-precision inputs work with it"],
            severity="warning" if lost else "info",
            evidence={"dtype": dtype, "entries": ", ".join(halves), "momentum": layer.momentum, "lost": bool(lost)},
        )


def _words(names: dict[str, torch.dtype]) -> list[str]:
    words = {"weight": "γ", "bias": "β", "running_mean": "running statistics", "running_var": "running statistics"}
    return list(dict.fromkeys(words.get(name, name) for name in names))


def _why(layer: LayerFacts, eps: float, statistics: list[str]) -> str:
    """What rounding does: a value stays where the change is below half of its last digit."""
    if layer.updates and statistics and layer.momentum:
        stall = min(1.0, eps / 2 / layer.momentum)
        return (
            f"a running statistic stays where it is, although the batch's differs from it by up to {100 * stall:.2g} %"
        )
    return f"an optimizer step that is smaller than {100 * eps / 2:.2g} % of a parameter is lost"


def _model(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()).to(dtype)


def _bfloat16() -> Case:
    return Case(_model(torch.bfloat16), ("1",))


def _float16_buffers() -> Case:
    model = _model(torch.float32)
    for name in _STATISTICS:
        setattr(model[1], name, getattr(model[1], name).half())
    return Case(model, ("1",))


def _inference() -> Case:
    return Case(_model(torch.float16).eval(), ("1",))


def _case(change: Callable[[nn.Sequential], object]) -> Case:
    model = _model(torch.float32)
    change(model)
    return Case(model)


def _float32() -> Case:
    return _case(lambda model: model.train())


def _only_the_others() -> Case:
    """Batch norms stay in float32, as they should."""
    return _case(lambda model: model[0].half())


RULE = Rule(
    id="KN114",
    name="half-precision",
    severity="warning",
    summary="Running statistics or parameters of a batch norm have half precision.",
    statistic="The dtypes of γ, β and the running statistics, and whether training changes them.",
    threshold="An update m·(batch − running) is rounded away where it is below half a unit in the last place, ε/2 of "
    "the value: the running statistic stalls while the batch's differs by ε/(2m). With m = 0.1 that is 4 % in bfloat16 "
    "(ε = 2⁻⁷) and 0.5 % in float16 (ε = 2⁻¹⁰); with m = 0.01 ten times as much. A warning where training updates such "
    "values, info in evaluation.",
    source="Micikevicius et al. (2018), arXiv:1710.03740, section 3: batch norm statistics and master weights in "
    "float32.",
    explanation="Running statistics that stall are those of some earlier time. In float16 a variance above 65,504 is "
    "infinite, and one below 6e-8 is 0.",
    remedy="Keep batch norms in float32: call .float() on them after model.half(), or use autocast, which leaves "
    "parameters and buffers alone.",
    check=check,
    sick=(_bfloat16, _float16_buffers, _inference),
    healthy=(_float32, _only_the_others),
)
