"""KN211: one layer normalizes inputs of several distributions in each batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import keelnorm
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.evidence.sampled_moments import SampledMoments
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE, batch_noise, changed_by
from keelnorm.doctor.rules._tests import t_test


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer that is called several times for a batch, with inputs of different moments."""
    for layer, calls, pooled in _judged(evidence):
        noise = float(batch_noise(pooled, REFERENCE, layer.eps).sum())
        ratios = [
            float(changed_by(call, pooled.mean, pooled.var, layer.eps).sum()) / max(noise, 1e-300) for call in calls
        ]
        worst = max(range(len(calls)), key=lambda index: ratios[index])
        if ratios[worst] > 1:
            named = [chr(ord("a") + index) for index in range(len(calls))]
            yield RULE.found(
                (layer.path,),
                f"{layer.named} is called {len(calls)} times for a batch, with inputs of different moments: evaluation "
                f"changes call {worst + 1} {ratios[worst]:.3g} times as much as the statistics of {REFERENCE} samples "
                "do.",
                [
                    f"model.set_submodule({layer.path!r}, kn.DomainBatchNorm({len(pooled.mean)}, {named}))",
                    "# and in the model's code, at each call: domain='a', domain='b', ...",
                ],
                evidence={"calls": len(calls), "call": worst + 1, "ratio": ratios[worst], "threshold": 1.0},
                p_value=_p_value(calls),
            )


def _judged(evidence: Evidence) -> Iterator[tuple[LayerFacts, tuple[SampledMoments, ...], SampledMoments]]:
    for layer in evidence.layers:
        seen = None if evidence.data is None else evidence.data.true.get(layer.path)
        if seen is None or not seen.calls or layer.fixed or layer.held or layer.is_variant:
            continue
        if all(call.is_finite and call.samples > 1 for call in seen.calls) and seen.moments.is_finite:
            yield layer, seen.calls, seen.moments


def _p_value(calls: tuple[SampledMoments, ...]) -> float:
    """Tests of each call's mean and variance against the first one's, with Bonferroni's correction."""
    first, smallest, tests = calls[0], 1.0, 0
    for other in calls[1:]:
        freedom = min(first.samples, other.samples) - 1
        for name, spread in (("mean", "mean_spread"), ("var", "var_spread")):
            distance = (getattr(other, name) - getattr(first, name)).abs()
            error = (getattr(other, spread) / other.samples + getattr(first, spread) / first.samples).sqrt()
            p = t_test(distance, error, freedom)
            smallest, tests = min(smallest, float(p.min())), tests + len(p)
    return min(1.0, smallest * tests)


def _tests(evidence: Evidence) -> int:
    return sum(1 for _ in _judged(evidence))


class _Shared(nn.Module):
    """A head for two inputs, each a function of the batch."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.scale = scale

    def _normalized(self, x: Tensor, domain: str) -> Tensor:
        if isinstance(self.norm, keelnorm.DomainBatchNorm):
            given: Tensor = self.norm(self.linear(x), domain=domain)
            return given
        y: Tensor = self.norm(self.linear(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self._normalized(x, "a") + self._normalized(self.scale * x.flip(0) + self.scale - 1, "b")


def _data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 3, generator=generator) for _ in range(4)]


def _two_domains() -> Case:
    return Case(_Shared(4.0), ("norm",), _data())


def _one_domain() -> Case:
    return Case(_Shared(1.0), batches=_data())


def _called_once() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), batches=_data())


RULE = Rule(
    id="KN211",
    name="several-distributions",
    severity="warning",
    summary="One layer normalizes inputs of several distributions in each batch.",
    statistic="For a layer that is called several times for a batch: the moments of each call's inputs, and the change "
    "of normalized values, as in KN201, between each call's statistics and those of all.",
    threshold=f"Above the change by the statistics of {REFERENCE} samples, and if t-tests between calls, corrected as "
    "in KN201, exclude chance.",
    source=f"{REFERENCE_SOURCE}. Cooijmans et al. (2016), arXiv:1603.09025, section 3: statistics for each step; "
    "Xie et al. (2019), arXiv:1911.09665: clean and adversarial samples; Wu, Johnson (2021), arXiv:2105.07576.",
    explanation="In training each call is normalized by its own moments, in evaluation all by the mixture's: a shared "
    "head, source and target, real and fake, or the steps of a recurrent network then get other values.",
    remedy="Give each distribution statistics of its own, or normalize all of them in one call.",
    check=check,
    sick=(_two_domains,),
    healthy=(_one_domain, _called_once),
    needs=("data",),
    tests=_tests,
)
