"""KN213: the features of the model's input have wildly different scales, and nothing normalizes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule

#: Gradient descent on a linear layer needs as many times more steps along the smaller feature as the square of this.
RATIO = 100.0


def check(evidence: Evidence) -> Iterator[Finding]:
    """One finding of the model, if no batch norm normalizes its input."""
    scales = None if evidence.data is None else evidence.data.features
    if scales is None or not bool(scales.isfinite().all()):
        return
    varying = scales[scales > 0]
    if len(varying) < 2 or _is_normalized(evidence, scales):
        return
    ratio = float(varying.max() / varying.min())
    if ratio > RATIO:
        most, least = int(scales.argmax()), int(torch.where(scales > 0, scales, torch.inf).argmin())
        yield RULE.found(
            (),
            f"The features of the input have deviations from {float(varying.min()):.3g} (feature {least}) to "
            f"{float(varying.max()):.3g} (feature {most}), and no batch norm stands in front.",
            [f"model = nn.Sequential(kn.BatchNorm1d({len(scales)}, affine=False), model)"],
            evidence={"ratio": ratio, "threshold": RATIO, "smallest": least, "largest": most},
        )


def _is_normalized(evidence: Evidence, scales: Tensor) -> bool:
    """Whether the input of some batch norm is that of the model."""
    assert evidence.data is not None
    for seen in evidence.data.as_is.values():
        deviations = seen.moments.var.sqrt()
        if deviations.shape == scales.shape and torch.allclose(deviations, scales, rtol=1e-3):
            return True
    return False


def _features(*scales: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, len(scales), generator=generator) * torch.tensor(scales) for _ in range(3)]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def _mixed() -> Case:
    return Case(_model(), (), _features(1e-3, 1.0, 1e3))


def _alike() -> Case:
    return Case(_model(), batches=_features(0.5, 1.0, 4.0))


def _normalized_first() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(3), _model()), batches=_features(1e-3, 1.0, 1e3))


RULE = Rule(
    id="KN213",
    name="unequal-scales",
    severity="info",
    summary="The features of the model's input have wildly different scales.",
    statistic="The ratio of the largest to the smallest standard deviation of the features of an input (N, F); "
    "constant ones are left out.",
    threshold=f"Above {RATIO:g}, where no batch norm normalizes the input itself. The condition number of a linear "
    "layer's loss is then above ten thousand.",
    source='LeCun, Bottou, Orr, Müller (1998), "Efficient BackProp", section 4.3.',
    explanation="The first layer mixes the features before any batch norm sees them, so that the largest decides and "
    "the smallest is learned slowly or never. A batch norm behind it can't separate them.",
    remedy="Normalize the input: a batch norm without γ and β in front, or standardized data.",
    check=check,
    sick=(_mixed,),
    healthy=(_alike, _normalized_first),
    needs=("data",),
)
