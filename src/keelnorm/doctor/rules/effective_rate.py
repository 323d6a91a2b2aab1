"""KN303: the next update turns the weights in front of a batch norm too far, or hardly at all."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import counted
from keelnorm.doctor.evidence.next_update import Update
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import at, batches_of, trained

#: Radians. From tan(1) = 1.6 on, the step is longer than the weights are.
TOO_FAR = 1.0
_HALF = 0.5
_HALVES = (torch.float16, torch.bfloat16)


def check(evidence: Evidence) -> Iterator[Finding]:
    """Weights that are replaced by one step; that a step leaves where they are; whose steps shrink."""
    found = {} if evidence.step is None else {
        path: one for path, one in evidence.step.next_updates.items() if one.rate and math.isfinite(one.angle)
    }  # fmt: skip
    far = {path: one for path, one in found.items() if one.angle > TOO_FAR}
    lost = {path: one for path, one in found.items() if one.lost > _HALF}
    if far:
        yield _too_far(far, new=all(evidence[path].is_initial for path in far))
    if lost:
        yield _lost(lost)
    growing = {path: one for path, one in found.items() if not one.decay and one.growth > 0}
    if growing:
        yield _growing(growing)


def _too_far(far: dict[str, Update], *, new: bool) -> Finding:
    worst = max(far.values(), key=lambda one: one.angle)
    factor = 0.1 / max(math.tan(min(worst.angle, 1.57)), 1.0)
    return RULE.found(
        far,
        f"The next step turns the weights of {worst.source} by {worst.angle:.2g} radians, in front of "
        f"{counted(len(far))} by more than {TOO_FAR:g}: "
        + ("they are new, and nothing is lost but length." if new else "what they have learned is replaced."),
        [
            "for group in optimizer.param_groups:  # a tenth of a radian, to begin with",
            f"    group['lr'] *= {factor:.1g}",
        ],
        severity="info" if new else "warning",
        evidence={"angle": worst.angle, "threshold": TOO_FAR, "learning rate": worst.rate},
    )


def _lost(lost: dict[str, Update]) -> Finding:
    worst = max(lost.values(), key=lambda one: one.lost)
    half = [one for one in lost.values() if one.dtype in _HALVES]
    dtype = str((half[0] if half else worst).dtype).removeprefix("torch.")
    return RULE.found(
        lost,
        f"The next step leaves {100 * worst.lost:.0f} % of the weights of {worst.source} as they are, and more than "
        f"half in front of {counted(len(lost))}: the change is below the last digit of {dtype}.",
        ["model.float()  # the optimizer keeps its parameters; torch.autocast computes in half precision"]
        if half
        else ["for group in optimizer.param_groups:", "    group['lr'] *= 1000  # or end the training"],
        severity="warning" if half else "info",
        evidence={"lost": worst.lost, "threshold": _HALF, "dtype": dtype, "learning rate": worst.rate},
    )


def _growing(growing: dict[str, Update]) -> Finding:
    fastest = max(growing.values(), key=lambda one: one.growth)
    steps = math.log(2) / (2 * math.log1p(fastest.growth))
    return RULE.found(
        growing,
        f"Weights in front of {counted(len(growing))} are not decayed, so each step makes them longer and the next "
        f"ones smaller: at the rate of this step, those of {fastest.source} learn half as fast after {steps:.2g} "
        "steps.",
        [
            "groups = kn.param_groups(model, weight_decay=5e-4)  # not γ and β",
            f"optimizer = torch.optim.SGD(groups, lr={fastest.rate:g}, momentum=0.9)  # or the one at hand",
        ],
        severity="info",
        evidence={"growth": fastest.growth, "steps": steps, "angle": fastest.angle},
    )


class _Casting(nn.Sequential):
    """Takes inputs of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(at(self, "0").weight.dtype)).float()  # type: ignore[no-any-return]


def _model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Casting(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


def _mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - 1).square().mean()
    return loss


def _case(model: nn.Module, rate: float, *, sick: bool = False, decay: float = 5e-4) -> Case:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    return Case(model, ("1",) if sick else (), batches_of(64, 8), optimizer, _mean_square)


def _rate_of_ten_thousand() -> Case:
    model = _model()
    trained(at(model, "1"))
    return _case(model, 1e4, sick=True)


def _small_weights() -> Case:
    """Weights that are a thousandth of the usual ones: their gradient is a thousand times as large."""
    model = _model()
    with torch.no_grad():
        at(model, "0").weight.mul_(1e-3)
    return _case(model, 1.0, sick=True)


def _in_bfloat16() -> Case:
    return _case(_model().bfloat16(), 1e-4, sick=True)


def _without_decay() -> Case:
    return _case(_model(), 0.1, sick=True, decay=0.0)


def _usual() -> Case:
    return _case(_model(), 0.1)


def _adam() -> Case:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Case(model, batches=batches_of(64, 8), optimizer=optimizer, loss=_mean_square)


def _end_of_a_schedule() -> Case:
    return _case(_model(), 0.0, decay=0.0)


RULE = Rule(
    id="KN303",
    name="effective-rate",
    severity="warning",
    summary="The next update turns the weights in front of a batch norm too far, or hardly at all.",
    statistic="One step of the optimizer on copies of the weights in front, with their gradients and the optimizer's "
    "state: the angle between the weights before and after, the growth of their norm, and the share of weights with a "
    "gradient that are as before. A batch norm makes the length of the weights irrelevant: the angle is what is "
    "learned, and with a gradient at right angles it is nearly η‖∇‖/‖w‖.",
    threshold="A warning above one radian, from where on the step is longer than the weights (info in new layers, "
    "which have nothing to lose: the norm grows, and the following steps are shorter); and where more than half "
    "of the weights stay as they are because a half-precision weight has no digit for the change (info in other "
    "precisions). Info where nothing decays the weights: their norm can only grow, by half of the squared angle a "
    "step. Silent at a learning rate of 0.",
    source="van Laarhoven (2017), arXiv:1706.05350, and Arora, Li, Lyu (2019), arXiv:1812.03981: the effective "
    "learning rate; Kosson, Messmer, Jaggi (2024), arXiv:2305.17212: the angle of an update, and its equilibrium "
    "with weight decay.",
    explanation="After a step that is too long the weights are noise, and longer, so that the following steps are too "
    "short. Without weight decay the effective learning rate falls as the inverse square of the norm, whatever the "
    "schedule says.",
    remedy="Lower the learning rate or warm it up, keep weights in float32, or decay those weights (and not γ and β).",
    check=check,
    sick=(_rate_of_ten_thousand, _small_weights, _in_bfloat16, _without_decay),
    healthy=(_usual, _adam, _end_of_a_schedule),
    needs=("optimizer", "step"),
    in_training=False,
)
