"""KN207: padding at the end of sequences counts in mean and variance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import keelnorm
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE, batch_noise, changed_by


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer with sequences of different lengths, whose padding changes its statistics."""
    data = evidence.data
    for layer in evidence.layers:
        seen = None if data is None else data.as_is.get(layer.path)
        if seen is None or seen.padding is None or not seen.moments.is_finite or layer.fixed:
            continue
        without = seen.padding.without
        noise = float(batch_noise(without, REFERENCE, layer.eps).sum())
        ratio = float(changed_by(without, seen.moments.mean, seen.moments.var, layer.eps).sum()) / max(noise, 1e-300)
        if ratio > 1:
            yield RULE.found(
                (layer.path,),
                f"{layer.named} counts padding: {100 * seen.padding.share:.0f} % of its positions are equal vectors at "
                f"the ends of samples. It changes the statistics {ratio:.3g} times as much as {REFERENCE} samples do.",
                [
                    f"model, _ = kn.convert(model, where={layer.path!r})"
                    if layer.path
                    else "model, _ = kn.convert(model)",
                    "# and in the model's code: norm(x, mask=kn.functional.length_mask(lengths, x.shape[2]))",
                    *_hook(layer.code),
                ],
                evidence={"share": seen.padding.share, "ratio": ratio, "threshold": 1.0},
            )


def _hook(code: str) -> list[str]:
    return [
        "def with_mask(layer, args, keywords):  # without changing the code, where padding is 0",
        "    return args, {**keywords, 'mask': (args[0] != 0).any(1)}",
        f"{code}.register_forward_pre_hook(with_mask, with_kwargs=True)",
    ]


def _sequences(*, equal: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        x = torch.randn(16, 3, 20, generator=generator) + 1
        lengths = torch.full((16,), 12) if equal else torch.randint(3, 20, (16,), generator=generator)
        found.append(torch.where(torch.arange(20) < lengths.view(-1, 1, 1), x, 0.0))
    return found


def _padded() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), ("0",), _sequences())


def _behind_a_convolution() -> Case:
    """Its output is 0 there too, without a bias."""
    return Case(nn.Sequential(nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4)), ("1",), _sequences())


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = keelnorm.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x, mask=(x != 0).any(1))
        return y


def _masked() -> Case:
    return Case(_Masked(), batches=_sequences())


def _full() -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), batches=[torch.randn(16, 3, 20, generator=generator)])


def _one_length() -> Case:
    """All end alike: that may be the data."""
    return Case(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), batches=_sequences(equal=True))


RULE = Rule(
    id="KN207",
    name="counted-padding",
    severity="warning",
    summary="Padding at the end of sequences counts in mean and variance.",
    statistic="Inputs (N, C, L) of which samples end in runs of one same vector, in different lengths; and the change "
    "of the normalized values, as in KN201, between statistics with and without those positions.",
    threshold=f"Above the change by the statistics of {REFERENCE} samples.",
    source=f"{REFERENCE_SOURCE}. Shen et al. (2020), arXiv:2003.07845, section 3: batch statistics in sequences vary.",
    explanation="The statistics then depend on how long the other sequences of the batch are, and evaluation, whose "
    "batches are padded otherwise, differs from training.",
    remedy="Give the layer a mask, which keelnorm's layers take; they count what is left alone.",
    check=check,
    sick=(_padded, _behind_a_convolution),
    healthy=(_masked, _full, _one_length),
    needs=("data",),
)
