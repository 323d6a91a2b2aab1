"""KN109: running statistics are NaN or infinite, or a running variance is negative or zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.dead import dead_below
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule, by_recalibrating
from keelnorm.doctor.rules._examples import at, batches_of

_NAMES = {"running_mean": "running mean", "running_var": "running variance"}


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer with running statistics that can't be right."""
    for layer in evidence.layers:
        bad = {name: number for name in _NAMES if (number := _not_finite(getattr(layer, name)))}
        for name, number in bad.items():
            yield _finding(layer, name, number, "is NaN or infinite")
        if layer.running_var is None or "running_var" in bad:
            continue
        if negative := int((layer.running_var < 0).sum()):
            yield _finding(layer, "running_var", negative, "is negative")
        elif zero := int((layer.running_var == 0).sum()):
            severity, why = _of_zero(layer)
            yield _finding(layer, "running_var", zero, why, severity)


def _not_finite(values: Tensor | None) -> int:
    return 0 if values is None else int((~values.isfinite()).sum())


def _of_zero(layer: LayerFacts) -> tuple[Severity, str]:
    """How bad a variance of 0 is: nothing but eps keeps the channel finite, unless γ has switched it off."""
    variance = layer.running_var
    assert variance is not None
    if layer.eps <= 0 or bool((variance == 0).all()):
        return "error", "is zero"
    gain = (1 / layer.eps) ** 0.5
    why = f"is zero: whatever differs from the running mean is multiplied by 1/√eps = {gain:.3g}"
    weight = layer.weight
    if weight is not None and weight.shape == variance.shape:
        dead = weight.abs() <= dead_below(weight, layer.bias, layer.dtypes["weight"])
        if bool(dead[variance == 0].all()):
            return "info", f"{why}, and γ, which is about 0, keeps it from the output"
    return "warning", why


def _finding(layer: LayerFacts, name: str, number: int, why: str, severity: Severity = "error") -> Finding:
    values = getattr(layer, name)
    where = f", where={layer.path!r}" if layer.path else ""
    thaw = [f"kn.unfreeze({layer.code}, affine=False)"] if layer.held else []
    return RULE.found(
        (layer.path,),
        f"The {_NAMES[name]} of {layer.named} {why}, in {number} of {values.numel()} channels.",
        [*thaw, f"kn.recalibrate(model, batches{where})"],
        severity=severity,
        evidence={"entry": name, "channels": number, "of": values.numel(), "smallest": float(values.min())},
    )


def _case(change: Callable[[nn.BatchNorm1d], object], *, sick: bool = True) -> Case:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    with torch.no_grad():
        change(norm)
    at(model, "0").weight.data.copy_(torch.eye(4, 3) + 0.5)
    return Case(model.eval(), ("1",) if sick else (), batches_of(4, 3))


def _set(name: str, value: float, *, everywhere: bool = False) -> Callable[[nn.BatchNorm1d], object]:
    def change(norm: nn.BatchNorm1d) -> None:
        tensor = getattr(norm, name)
        (tensor if everywhere else tensor[1:2]).fill_(value)

    return change


def _nan_mean() -> Case:
    return _case(_set("running_mean", float("nan")))


def _infinite_variance() -> Case:
    return _case(_set("running_var", float("inf")))


def _negative_variance() -> Case:
    return _case(_set("running_var", -1e-6))


def _zero_variance() -> Case:
    return _case(_set("running_var", 0.0))


def _empty_buffer() -> Case:
    return _case(_set("running_var", 0.0, everywhere=True))


def _switched_off() -> Case:
    """A channel that was switched off long ago: its input is constant, and γ is 0."""

    def change(norm: nn.BatchNorm1d) -> None:
        norm.weight[1] = 0.0
        assert norm.running_var is not None
        norm.running_var[1] = 0.0

    return _case(change)


def _new() -> Case:
    return _case(lambda norm: None, sick=False)


def _tiny_variance() -> Case:
    return _case(_set("running_var", 1e-30), sick=False)


RULE = Rule(
    id="KN109",
    name="broken-statistics",
    severity="error",
    summary="Running statistics are NaN or infinite, or a running variance is negative or zero.",
    statistic="The values of running mean and running variance.",
    threshold="NaN, infinite, or a variance below 0: no update from finite data leaves that behind (error). A variance "
    "of exactly 0 in a whole layer, or with eps = 0, is an error as well. In single channels it arises where the input "
    "has been constant for about 1000 batches (0.9¹⁰⁰⁰ is 0 in float32): a warning, because the channel is multiplied "
    "by 1/√eps as soon as its input moves; info where γ has switched the channel off.",
    source="The definition, y = (x − mean) / √(var + eps) · γ + β.",
    explanation="One batch with NaN or an overflow spoils running statistics for good: every later average contains "
    "it. Training goes on, because the batch normalizes there; evaluation gives NaN, or a constant.",
    remedy="Compute the statistics from data with kn.recalibrate. keelnorm's layers leave batches with NaN out and "
    "count them.",
    check=check,
    sick=(
        _nan_mean, _infinite_variance, _negative_variance, _zero_variance, _empty_buffer, _switched_off,
    ),
    healthy=(_new, _tiny_variance),
    fix=by_recalibrating,
)  # fmt: skip
