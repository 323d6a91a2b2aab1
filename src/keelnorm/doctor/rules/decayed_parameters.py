"""KN102: weight decay is applied to γ and β."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts, counted
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule


def check(evidence: Evidence) -> Iterator[Finding]:
    """One finding for each group of the optimizer that decays γ or β."""
    optimizer = evidence.optimizer
    assert optimizer is not None
    for index, group in enumerate(optimizer.param_groups):
        decay = float(group.get("weight_decay", 0.0))
        layers = _decayed(evidence, group) if decay else []
        if layers:
            count = sum(parameter.numel() for layer in layers for parameter in _own(layer, group))
            yield RULE.found(
                (layer.path for layer in layers),
                f"{type(optimizer).__name__} decays γ and β of {counted(len(layers))} by {decay:g} (group {index}).",
                _remedy(optimizer, group),
                evidence={"weight decay": decay, "group": index, "parameters": count},
            )


def _own(layer: LayerFacts, group: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters of a layer that a group trains."""
    members = {id(parameter) for parameter in group["params"]}
    return [value for value in layer.module.parameters() if value.requires_grad and id(value) in members]


def _decayed(evidence: Evidence, group: dict[str, Any]) -> list[LayerFacts]:
    return [layer for layer in evidence.layers if _own(layer, group)]


def _remedy(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[str]:
    kind = type(optimizer)
    module = "torch.optim." if kind.__module__.startswith("torch.optim") else ""
    name = f"{module}{kind.__name__}" if module else "type(optimizer)"
    rate = group.get("lr")
    options = f", lr={float(rate):g}" if isinstance(rate, float | int) else ""
    momentum = f", momentum={group['momentum']:g}" if group.get("momentum") else ""
    return [
        f"groups = kn.param_groups(model, weight_decay={group['weight_decay']:g})",
        f"optimizer = {name}(groups{options}{momentum})  # and its other options",
    ]


def fix(model: nn.Module, finding: Finding, evidence: Evidence) -> str | None:
    """Move γ and β into a group without decay; what the optimizer has stored for them stays.

    Not where a learning rate schedule has noted the optimizer's groups: it would not follow the new one.
    """
    optimizer = evidence.optimizer
    assert optimizer is not None
    if any("initial_lr" in group for group in optimizer.param_groups):
        return None
    group = optimizer.param_groups[int(finding.evidence["group"] or 0)]
    moved = {id(value) for path in finding.layers for value in _own(evidence[path], group)}
    if len(moved) == len(group["params"]):
        group["weight_decay"] = 0.0
        return "the weight decay of its group was set to 0"
    names = group.get("param_names")
    new = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    new["params"] = [parameter for parameter in group["params"] if id(parameter) in moved]
    if names is not None:
        pairs = list(zip(group["params"], names, strict=True))
        new["param_names"] = [name for parameter, name in pairs if id(parameter) in moved]
        group["param_names"] = [name for parameter, name in pairs if id(parameter) not in moved]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    optimizer.param_groups.append({**new, "weight_decay": 0.0})
    return f"{len(moved)} of its parameters were moved to a group without weight decay"


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def _all_in_one_group() -> Case:
    model = _model()
    return Case(model, ("1",), optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))


def _default_of_adamw() -> Case:
    """AdamW decays by 0.01 where nobody asks for it; and names are kept."""
    model = _model()
    return Case(model, ("1",), optimizer=torch.optim.AdamW(model.named_parameters(), lr=1e-3))


def _in_the_second_group() -> Case:
    model = _model()
    groups: list[dict[str, Any]] = [
        {"params": model[3].parameters(), "weight_decay": 0.0},
        {"params": model[:2].parameters()},
    ]
    return Case(model, ("1",), optimizer=torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1))


def _separate_groups() -> Case:
    from keelnorm.surgery import param_groups

    model = _model()
    return Case(model, optimizer=torch.optim.AdamW(param_groups(model, weight_decay=0.05)))


def _frozen_or_without_decay() -> Case:
    model = _model()
    model[1].requires_grad_(False)
    return Case(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))


RULE = Rule(
    id="KN102",
    name="weight-decay",
    severity="info",
    summary="The optimizer decays γ and β.",
    statistic="The weight decay of the optimizer's groups that have a γ or β which requires a gradient.",
    threshold="Above 0. It is info, not a warning: many published networks were trained so, and the effect on accuracy "
    "is small, in either direction.",
    source="van Laarhoven (2017), arXiv:1706.05350; He et al. (2018), arXiv:1812.01187, section 3.1 (no bias decay); "
    "against it, for some networks, Summers, Dinneen (2020), arXiv:1906.03548, section 3.3.",
    explanation="Decay of a weight in front of a batch norm changes only the effective step size, because its scale "
    "has no effect on the output. γ and β do have one: decay pulls the function itself towards a constant, and "
    "switches channels off.",
    remedy="Give the optimizer two groups: kn.param_groups(model, weight_decay) makes them.",
    check=check,
    sick=(_all_in_one_group, _default_of_adamw, _in_the_second_group),
    healthy=(_separate_groups, _frozen_or_without_decay),
    needs=("optimizer",),
    fix=fix,
)
