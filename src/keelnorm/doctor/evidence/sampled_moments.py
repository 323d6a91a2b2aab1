"""Moments of a layer's inputs over batches, and how much they vary from sample to sample and from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keelnorm.functional import moments as moments_of
from keelnorm.moments import Moments


class Samples(NamedTuple):
    """The moments of each sample of one call: the positions of a sample depend on each other, samples do not.

    Args:
        moments: Count, mean and M2 of each sample's channels, as N·C channels, where x is: nothing waits for a GPU.
        samples: The number of samples N.
    """

    moments: Moments
    samples: int

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Samples:
        """The moments of x, (N, C, *S).

        Args:
            x: Values.
            mask: Which count, (N,) or (N, *S).
        """
        samples, channels = x.shape[:2]
        x = x.detach().reshape(samples, channels, -1)
        if mask is not None:  # that of a sample holds for each of its channels
            mask = mask.reshape(samples, 1, -1).expand_as(x).reshape(1, samples * channels, -1)
        own = moments_of(x.reshape(1, samples * channels, -1), mask)
        return cls(Moments(own.count.expand_as(own.mean), own.mean, own.m2), samples)

    def exact(self) -> Samples:
        """The same in float64 on the CPU."""
        parts = (getattr(self.moments, name).cpu().double() for name in ("count", "mean", "m2"))
        return Samples(Moments(*parts), self.samples)

    def with_other(self, other: Samples) -> Samples:
        """The moments where the same samples were called twice: merged sample by sample.

        Calls with another number of samples are samples of their own.
        """
        self, other = self.exact(), other.exact()
        if self.samples == other.samples:
            return Samples(self.moments.merge(other.moments), self.samples)
        parts = ((getattr(one.moments, name) for one in (self, other)) for name in ("count", "mean", "m2"))
        return Samples(Moments(*(torch.cat(list(part)) for part in parts)), self.samples + other.samples)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count of each sample, (N,), mean and biased variance, (N, C), in float64; without samples of no values."""
        own = self.exact().moments
        count, mean, var = (part.reshape(self.samples, -1) for part in (own.count, own.mean, own.var_or_zero))
        there = count[:, 0] > 0
        return count[there, 0], mean[there], var[there]


@dataclass(frozen=True)
class SampledMoments:
    """What all batches say about the inputs of a layer. Vectors are (C,), in float64 on the CPU.

    A sample i has w_i values of mean m_i and of mean squared deviation from the mean of all values q_i.

    Args:
        mean: The mean μ of all values.
        var: Their biased variance v.
        mean_spread: n·SE(μ)², the variance of the mean of one sample: n²/(n − 1) · Σ w_i²·(m_i − μ)² / (Σ w_i)².
        var_spread: n·SE(v)², that of the mean squared deviation of one sample, in the same way from q_i − v.
        unlike: F of the batches' means: how much they vary, as a multiple of what they vary if samples are drawn at
            random. None with fewer than two batches, or one sample in each.
        largest: The largest share that one sample has in the sum of squared deviations.
        sizes: The number of samples of each batch.
        values: The number of values.
    """

    mean: Tensor
    var: Tensor
    mean_spread: Tensor
    var_spread: Tensor
    unlike: Tensor | None
    largest: Tensor
    sizes: tuple[int, ...]
    values: float

    @property
    def samples(self) -> int:
        """The number of samples n."""
        return sum(self.sizes)

    @property
    def is_finite(self) -> bool:
        """Whether all inputs were finite."""
        return bool((self.mean.isfinite() & self.var.isfinite()).all())

    def effective(self, samples: float) -> Tensor:
        """How many independent values a batch of so many samples has, (C,): the variance of its mean is v over that.

        Positions of an image are correlated, so that it is less than the number of values.
        """
        return samples * self.var / self.mean_spread.clamp(min=torch.finfo(torch.float64).tiny)


class SamplesSum:
    """Sums over samples, from which :class:`SampledMoments` follow.

    They are taken about the first batch's mean, so that nothing is lost where means are far above deviations.
    """

    def __init__(self) -> None:
        self._shift: Tensor | None = None
        self._sizes: list[int] = []

    def add(self, batch: Samples) -> None:
        """Add the samples of one batch."""
        count, mean, var = batch.table()
        if not len(count):
            return
        if self._shift is None:
            self._shift = (count.unsqueeze(1) * mean).sum(0) / count.sum()
            zeros = torch.zeros_like(self._shift)
            self._weight, self._weight2 = 0.0, 0.0
            self._a, self._b, self._a2, self._b2, self._aa, self._ab, self._bb = (zeros.clone() for _ in range(7))
            self._within, self._between, self._between_first = (zeros.clone() for _ in range(3))
            self._most = zeros.clone()
        w = count.unsqueeze(1)
        w2 = w.square()
        a = mean - self._shift
        b = var + a.square()
        self._sizes.append(len(count))
        self._weight += float(count.sum())
        self._weight2 += float(count.square().sum())
        self._a += (w * a).sum(0)
        self._b += (w * b).sum(0)
        self._a2 += (w2 * a).sum(0)
        self._b2 += (w2 * b).sum(0)
        self._aa += (w2 * a.square()).sum(0)
        self._ab += (w2 * a * b).sum(0)
        self._bb += (w2 * b.square()).sum(0)
        own = a.mean(0)
        self._within += (a - own).square().sum(0)
        self._between_first += len(count) * own
        self._between += len(count) * own.square()
        self._most = torch.maximum(self._most, (w * b).amax(0))

    def moments(self) -> SampledMoments | None:
        """What they say; None without a sample."""
        if self._shift is None:
            return None
        n, weight = sum(self._sizes), self._weight
        d = self._a / weight
        var = (self._b / weight - d.square()).clamp(min=0)
        # With e = d² − v, q_i − v = b_i − 2·d·a_i + e, where a_i and b_i are about the shift.
        e = d.square() - var
        means = self._aa - 2 * d * self._a2 + d.square() * self._weight2
        squares = (
            self._bb + 4 * d.square() * self._aa + e.square() * self._weight2
            - 4 * d * self._ab + 2 * e * self._b2 - 4 * d * e * self._a2
        )  # fmt: skip
        factor = n * n / (max(n - 1, 1) * weight**2)
        total = self._b - weight * d.square()
        return SampledMoments(
            mean=self._shift + d,
            var=var,
            mean_spread=(factor * means).clamp(min=0),
            var_spread=(factor * squares).clamp(min=0),
            unlike=self._unlike(n),
            largest=(self._most / total.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1),
            sizes=tuple(self._sizes),
            values=weight,
        )

    def _unlike(self, n: int) -> Tensor | None:
        """One-way analysis of variance of the samples' means, with batches as groups; 1 where batches do not vary."""
        batches = len(self._sizes)
        if batches < 2 or n <= batches:
            return None
        between = (self._between - self._between_first.square() / n).clamp(min=0) / (batches - 1)
        within = self._within / (n - batches)
        rounding = torch.finfo(torch.float64).eps * self._between.clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(between > rounding, between / torch.maximum(within, rounding), 1.0)
