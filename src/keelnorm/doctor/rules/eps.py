"""KN104: eps is not legal, hides or exceeds the variance, or differs from that of the other layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at

#: PyTorch's default.
USUAL = 1e-5


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer whose eps is out of range; then those that differ from most of the others."""
    bad = set()
    for layer in evidence.layers:
        judged = _judged(layer)
        if judged is not None:
            severity, why, threshold = judged
            bad.add(layer.path)
            yield RULE.found(
                (layer.path,),
                f"{layer.named} has eps {layer.eps:g}: {why}.",
                [f"{layer.code}.eps = {USUAL:g}"],
                severity=severity,
                evidence={"eps": layer.eps, "threshold": threshold},
            )
    yield from _odd([layer for layer in evidence.layers if layer.path not in bad])


def _judged(layer: LayerFacts) -> tuple[Severity, str, float] | None:
    eps = layer.eps
    if not math.isfinite(eps) or eps < 0:
        return "error", "it has to be a finite number above 0", 0.0
    if eps == 0 and layer.uses_batch:
        return "error", "layers raise in training, where it has to be above 0", 0.0
    least = rounding(layer)
    if eps < least:
        return (
            "warning",
            f"a channel that is constant up to rounding (variance {least:.1g}) is blown up to variance 1",
            least,
        )
    if layer.running_var is None or layer.own_scale is not None or not _is_positive(layer.running_var):
        return None
    median, largest = float(layer.running_var.median()), float(layer.running_var.max())
    if eps > largest:
        return "warning", f"it exceeds the running variance in every channel (largest {largest:.2g})", largest
    if eps > median:
        return "info", f"it exceeds the running variance in half of the channels (median {median:.2g})", median
    return None


def _is_positive(variance: Tensor) -> bool:
    """Whether no variance is broken (KN109)."""
    return bool((variance.isfinite() & (variance > 0)).all())


def rounding(layer: LayerFacts) -> float:
    """The variance of a constant of size 1 up to rounding, in the dtype in which the layer computes."""
    wide = torch.float64 in layer.dtypes.values()
    return float(torch.finfo(torch.float64 if wide else torch.float32).eps) ** 2


def _odd(layers: list[LayerFacts]) -> Iterator[Finding]:
    """Layers with another eps than most."""
    counts = Counter(layer.eps for layer in layers)
    if len(counts) < 2:
        return
    [(usual, number)] = counts.most_common(1)
    if number <= len(layers) / 2:
        return
    for layer in layers:
        if layer.eps != usual:
            yield RULE.found(
                (layer.path,),
                f"{layer.named} has eps {layer.eps:g}, and {number} of {len(layers)} batch norms have {usual:g}.",
                [f"{layer.code}.eps = {usual:g}  # if the weights were trained with it"],
                severity="info",
                evidence={"eps": layer.eps, "of most": usual},
            )


def _layers(*values: float, variance: float = 1.0) -> nn.Sequential:
    norms = [nn.BatchNorm1d(4, eps=value) for value in values]
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.fill_(variance)
    return nn.Sequential(*norms)


def _zero() -> Case:
    return Case(_layers(0.0), ("0",))


def _negative() -> Case:
    return Case(_layers(1e-5, -1e-5, 1e-5), ("1",))


def _lost_in_rounding() -> Case:
    return Case(_layers(1e-16), ("0",))


def _larger_than_the_variance() -> Case:
    return Case(_layers(1e-3, variance=1e-4), ("0",))


def _larger_than_half() -> Case:
    model = _layers(1e-3, variance=1e-4)
    at(model, "0").running_var[0] = 1.0
    return Case(model, ("0",))


def _one_of_another_source() -> Case:
    return Case(_layers(1e-3, 1e-3, 1e-5), ("2",))


def _usual() -> Case:
    return Case(_layers(1e-5, 1e-5))


def _of_tensorflow() -> Case:
    return Case(_layers(1e-3, 1e-3, variance=0.01))


def _float64() -> Case:
    return Case(_layers(1e-16).double())


def _two_halves() -> Case:
    """As in a network of two published halves, where neither is odd."""
    return Case(_layers(1e-3, 1e-5))


RULE = Rule(
    id="KN104",
    name="eps",
    severity="error",
    summary="eps is out of range, or unlike that of the other layers.",
    statistic="eps, compared with the variance of a channel that is constant up to rounding, with the running "
    "variances, and with eps of the other layers.",
    threshold="Negative or not finite: the square root of var + eps fails (error). Below u², u the rounding unit of "
    "float32 (1.2e-7; of float64 for a float64 layer): values of size 1 that are equal up to rounding have a variance "
    "of about u², and become noise of variance 1 (warning). Above the running variance: the output has less than half "
    "of its variance; in all channels the layer does not normalize (warning), in half of them it may be meant (info). "
    "Another eps than more than half of the layers have is info.",
    source="Ioffe, Szegedy (2015), arXiv:1502.03167, algorithm 1: a constant for numerical stability. Defaults: 1e-5 "
    "in PyTorch, 1e-3 in TensorFlow and Keras.",
    explanation="eps is no entry of a state_dict. Weights that were trained with TensorFlow's 1e-3 and are used with "
    "PyTorch's 1e-5 give another function, most of all in channels of small variance. An eps that is too small "
    "amplifies rounding noise and gradients in channels that are almost constant.",
    remedy="Set eps to what the weights were trained with, else to 1e-5.",
    check=check,
    sick=(_zero, _negative, _lost_in_rounding, _larger_than_the_variance, _larger_than_half, _one_of_another_source),
    healthy=(_usual, _of_tensorflow, _float64, _two_halves),
)
