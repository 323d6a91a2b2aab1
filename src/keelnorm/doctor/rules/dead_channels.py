"""KN111: γ of a channel is about 0, so its output is β whatever comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from keelnorm.doctor.evidence.dead import dead_below
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer with dead channels, unless it is new: many networks begin with γ = 0 at the end of a branch."""
    for layer in evidence.layers:
        weight = layer.weight
        if weight is None or weight.ndim != 1 or not bool(weight.isfinite().all()):
            continue
        below = dead_below(weight, layer.bias, layer.dtypes["weight"])
        dead = weight.abs() <= below
        number, channels = int(dead.sum()), dead.numel()
        if not number or _is_new(layer):
            continue
        severity: Severity = "warning" if number == channels else "info"
        all_of_it = ": it passes nothing on but β" if number == channels else ", whose output is β whatever comes in"
        yield RULE.found(
            (layer.path,),
            f"{layer.named} has γ ≈ 0 in {number} of {channels} channels{all_of_it}.",
            [
                f"layer = {layer.code}",
                f"with torch.no_grad():  # then train on, without weight decay of γ (kn.param_groups)\n"
                f"    layer.weight[{_index(dead)}] = 1.0",
            ],
            severity=severity,
            evidence={
                "channels": number, "of": channels, "largest dead": float(weight.abs()[dead].max()),
                "threshold": float(below.max()),
            },
        )  # fmt: skip


def _is_new(layer: LayerFacts) -> bool:
    """Whether γ is still 0 from the start: β, which gets a gradient all the same, is then 0 too.

    Without β, whether the layer has seen a batch.
    """
    assert layer.weight is not None
    if bool((layer.weight != 0).any()):
        return False
    return bool((layer.bias == 0).all()) if layer.bias is not None else not layer.batches and layer.is_initial


def _index(dead: torch.Tensor) -> str:
    if bool(dead.all()):
        return ":"
    return str(dead.nonzero().flatten().tolist())


def _case(change: Callable[[nn.BatchNorm1d], object], *, sick: bool = True) -> Case:
    norm = nn.BatchNorm1d(5)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(100)
    with torch.no_grad():
        change(norm)
    return Case(nn.Sequential(norm, nn.ReLU()), ("0",) if sick else ())


def _weights(*values: float) -> Callable[[nn.BatchNorm1d], object]:
    return lambda norm: norm.weight.copy_(torch.tensor(values))


def _some() -> Case:
    return _case(_weights(1.0, 0.0, -0.5, 1e-12, 0.3))


def _all_of_a_trained_layer() -> Case:
    def change(norm: nn.BatchNorm1d) -> None:
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, 0.1)

    return _case(change)


def _lost_beside_the_bias() -> Case:
    def change(norm: nn.BatchNorm1d) -> None:
        norm.weight[2], norm.bias[2] = 1e-6, 20.0

    return _case(change)


def _one_channel_decayed() -> Case:
    return _case(_weights(0.2, 0.2, 0.2, 0.2, 1e-9))


def _usual() -> Case:
    return _case(_weights(1.0, 0.5, -0.2, 0.01, 2.0), sick=False)


def _zero_at_the_start() -> Case:
    """Some batches were run, and no step was taken yet."""
    return _case(_weights(*[0.0] * 5), sick=False)


def _all_small() -> Case:
    """Their size does not matter, since all of them are."""
    return _case(_weights(*[1e-9] * 5), sick=False)


RULE = Rule(
    id="KN111",
    name="dead-channels",
    severity="warning",
    summary="γ of a channel is about 0: its output is β whatever comes in.",
    statistic="|γ| of each channel.",
    threshold="u · max(|β|, root mean square of γ), u the rounding unit of the layer's dtype (1.2e-7 in float32). The "
    "normalized input has variance 1, so up to there all of γ·x̂ is lost when it is added to β, or to the other "
    "channels in the next layer. Single channels are info, since trained networks have them; a trained layer without a "
    "living channel is a warning. Where all of γ and of β are exactly 0, the layer is new, and meant so: training "
    "gives β another value at once.",
    source="Liu et al. (2017), arXiv:1708.06519: channels are pruned by γ; Mehta et al. (2019), arXiv:1811.12495: "
    "weight decay and adaptive methods switch channels off; Goyal et al. (2017), arXiv:1706.02677, section 5.1: γ = 0 "
    "at the start.",
    explanation="No gradient goes through such a channel to the layers in front, and it costs as much as a living one. "
    "Weight decay of γ, a ReLU that never fires, or pruning leave it behind.",
    remedy="Prune the channels, or set their γ to 1 and train on without decay of γ.",
    check=check,
    sick=(_some, _all_of_a_trained_layer, _lost_beside_the_bias, _one_channel_decayed),
    healthy=(_usual, _zero_at_the_start, _all_small),
)
