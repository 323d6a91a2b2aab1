"""KN301: gradients grow or shrink from layer to layer, so that one end of the model does not learn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import batches_of, settled

#: What fifty layers with ReLU do: (π/(π − 1))^(50/2) = 14,000.
LIMIT = 1e4
#: Fewer layers show no trend.
_FEWEST = 4
#: One layer without a gradient may be a dead one.
_FEWEST_WITHOUT = 2
#: The share of the variance of the logarithms that the depth has to explain.
_EXPLAINED = 0.5


class Trend(NamedTuple):
    """How a gradient's norm changes through depth.

    Args:
        factor: The factor from one layer to the next, in the order of the backward.
        total: The factor from the last layer to the first.
        explained: The share of the variance of the logarithms that the depth explains.
    """

    factor: float
    total: float
    explained: float


def trend_of(norms: Sequence[float]) -> Trend | None:
    """The trend of norms, which are in the order of the forward: a line through their logarithms, by least squares.

    Norms of 0 are left out, as behind a γ of 0. None with fewer than four others, or where one is not finite.
    """
    there = [index for index, norm in enumerate(norms) if norm != 0]
    if len(there) < _FEWEST or not all(map(math.isfinite, norms)):
        return None
    logs = torch.tensor([norms[index] for index in there], dtype=torch.float64).log()
    depth = torch.tensor(there, dtype=torch.float64)
    depth, left = depth - depth.mean(), logs - logs.mean()
    slope = float(depth.dot(left) / depth.dot(depth))
    variance = float(left.dot(left))
    explained = slope**2 * float(depth.dot(depth)) / variance if variance > 0 else 0.0
    return Trend(math.exp(-slope), math.exp(min(-slope * (len(norms) - 1), 700.0)), explained)


def check(evidence: Evidence) -> Iterator[Finding]:
    """The model as a whole, if the trend through its layers goes beyond the limit."""
    step = evidence.step
    if step is None:
        return
    reached = [layer for layer in evidence.layers if layer.path in step.gradients]
    norms = [step.gradients[layer.path] for layer in reached]
    nothing = next((index for index, norm in enumerate(norms) if norm != 0), len(norms))
    if nothing >= _FEWEST_WITHOUT:
        yield RULE.found(
            (),
            f"The gradient is 0 at the first {nothing} of {len(norms)} batch norms: it vanishes on the way, and they "
            "learn nothing.",
            _thawed() if all(layer.fixed or layer.held for layer in reached) else _nearly_linear(),
            evidence={"without": nothing, "threshold": _FEWEST_WITHOUT, "layers": len(norms)},
        )
        return
    trend = trend_of(norms)
    if trend is None or trend.explained < _EXPLAINED or 1 / LIMIT < trend.total < LIMIT:
        return
    grows = trend.total > 1
    fixed = [layer.path for layer in reached if layer.fixed or layer.held]
    last, first = reached[-1].named, reached[0].named
    yield RULE.found(
        (),
        f"From {last} back to {first} the gradient {'grows' if grows else 'shrinks'} by a factor of {trend.factor:.2g} "
        f"a layer, about 10^{math.log10(trend.total):.0f} in all: with one learning rate, one end "
        "learns and the other does not.",
        _thawed() if len(fixed) == len(reached) else _nearly_linear(),
        evidence={
            "factor": trend.factor, "total": trend.total, "threshold": LIMIT, "layers": len(reached),
            "explained": trend.explained,
        },
    )  # fmt: skip


def _thawed() -> list[str]:
    return [
        "kn.unfreeze(model, affine=False)",
        "kn.recalibrate(model, batches)  # fixed statistics that do not fit scale the gradient at each layer",
    ]


def _nearly_linear() -> list[str]:
    return [
        "# A residual connection around every two or three layers is the usual remedy. Without one, begin in the",
        "# nearly linear range: β = 2 in front of ReLU; γ = 0.1 in front of tanh or a sigmoid.",
        "for layer in model.modules():",
        "    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and layer.affine:",
        "        nn.init.constant_(layer.bias, 2.0)",
    ]


def _mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _chain(depth: int, width: int = 64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [part for _ in range(depth) for part in _block(width)]
        return nn.Sequential(*parts, nn.Linear(width, 1))


def _block(width: int) -> tuple[nn.Module, ...]:
    return nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_block(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def _deep() -> Case:
    return Case(_chain(76), batches=batches_of(128, 64), loss=_mean_square)


def _frozen_elsewhere() -> Case:
    """Frozen statistics of inputs that were ten times as large."""
    model, batches = _chain(8), batches_of(64, 64)
    settled(model, batches, rounds=50)
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.zero_()
            layer.running_var.mul_(100.0)
    kn.freeze(model)
    return Case(model, batches=batches, loss=_mean_square)


def _underflown() -> Case:
    """The same so far off that nothing is left in float32."""
    case = _frozen_elsewhere()
    for layer in case.model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.running_var is not None
            layer.running_var.mul_(1e13)
    return case


def _usual_depth() -> Case:
    return Case(_chain(16), batches=batches_of(128, 64), loss=_mean_square)


def _with_residuals() -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(_Residual(64) for _ in range(70)), nn.Linear(64, 1))
    return Case(model, batches=batches_of(128, 64), loss=_mean_square)


RULE = Rule(
    id="KN301",
    name="gradients-through-depth",
    severity="warning",
    summary="Gradients grow or shrink from layer to layer, so that one end of the model does not learn.",
    statistic="The norm of the loss's gradient with respect to each layer's output: the slope of a line through the "
    "logarithms, by the layers' order in the forward.",
    threshold="A factor of 10,000 between the ends of that line, if it explains at least half of the variance. A "
    "batch-normalized network with ReLU and without residual connections multiplies the squared norm by π/(π − 1) a "
    "layer when it is new: 50 layers reach that factor, and such networks do not train at that depth. Or gradients of "
    "0 at the first layers, two at least, which have underflowed.",
    source='Yang et al. (2019), "A Mean Field Theory of Batch Normalization", arXiv:1902.08129: the factor, and that '
    "such networks are not trainable at large depths.",
    explanation="A step that suits the layers with large gradients leaves the others where they are. The first steps "
    "of training often even it out, so it counts most where training does not begin at all.",
    remedy="Add residual connections, or begin in the range in which the activation is nearly linear. Where the layers "
    "have fixed statistics, compute them again.",
    check=check,
    sick=(_deep, _frozen_elsewhere, _underflown),
    healthy=(_usual_depth, _with_residuals),
    needs=("step",),
)
