"""Mergeable moments per channel: count, mean and sum of squared deviations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keelnorm.engine.collectives import gather, group_of
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.layout import per_channel, reduced_dims
from keelnorm.moments.moments_arguments import (
    Weighting,
    broadcast_mask,
    broadcast_weight,
    check_values,
    check_weighting,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from keelnorm.engine.preflight import Step

#: The least sum of frequencies that has an unbiased variance: above 1, by more than the rounding, in any dtype, of
#: weights that were scaled to sum to 1.
LEAST_FREQUENCY = 1 + 1 / 64


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of moments: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which values of ``x`` are summed: never narrower than float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations (M2) of each channel; merging them is exact.

    For the values v of a channel: mean = Σv / count and m2 = Σ(v − mean)²; with weights w, count = Σw,
    mean = Σwv / count and m2 = Σw(v − mean)². Two sets a and b merge to
    n = n_a + n_b, δ = mean_b − mean_a, mean = mean_a + δ·n_b/n, m2 = m2_a + m2_b + δ²·n_a·n_b/n, without the
    cancellation of Σv² − (Σv)²/n.

    Attributes:
        count: Number of values per channel, or their weight; shape () if it is the same for all channels, else (C,).
        mean: Shape (C,). Zero where the count is zero.
        m2: Shape (C,), not negative. Zero where the count is zero.
        squares: Σw² of importance weights, shape as ``count``; merging adds it up. None for values without weights or
            with frequency weights, for which it is the count.

    Numerics:
        float64 (float32 on devices without it), whatever the values' dtype.

    Example:
        >>> a, b = torch.randn(4, 3), torch.randn(9, 3)
        >>> merged = Moments.from_tensor(a).merge(Moments.from_tensor(b))
        >>> torch.allclose(merged.var, torch.cat([a, b]).double().var(0, correction=0))
        True

    Source:
        Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
        variances", eq. 2.1.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    squares: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise unless the fields are tensors whose shapes fit together."""
        if not (isinstance(self.count, Tensor) and isinstance(self.mean, Tensor) and isinstance(self.m2, Tensor)):
            given = ", ".join(f"{name} {describe(getattr(self, name))}" for name in ("count", "mean", "m2"))
            raise TypeError(
                f"Moments: count, mean and m2 must be tensors; got {given}. Moments.from_tensor(x) takes data"
            )
        one_each = self.count.dim() == self.mean.dim() and all(
            size in (1, channels) for size, channels in zip(self.count.shape, self.mean.shape, strict=True)
        )
        if self.mean.shape != self.m2.shape or not (self.count.dim() == 0 or one_each):
            given = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in ("count", "mean", "m2"))
            raise ValueError(f"Moments: mean and m2 must have shape (C,), count () or (C,); got {given}")

    @classmethod
    def empty(cls, channels: int, *, device: torch.device | str | None = None) -> Moments:
        """The moments of no values: the neutral element of :meth:`merge`.

        Raises:
            ValueError: ``channels`` is not an integer from 0 on.
        """
        if not is_count(channels, 0):
            raise ValueError(f"Moments.empty: channels must be an integer from 0 on; got {describe(channels)}")
        dtype = wide_dtype(torch.device(device or "cpu"))
        zeros = torch.zeros(channels, dtype=dtype, device=device)
        return cls(torch.zeros((), dtype=dtype, device=device), zeros, zeros.clone())

    @classmethod
    def from_tensor(
        cls,
        x: Tensor,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weighting: Weighting = "frequency",
    ) -> Moments:
        """Compute the moments of each channel of ``x``, over its batch and all its positions.

        Args:
            x: Floating-point values, shape (N, C, *S).
            mask: True for values that count, boolean; shape (N,), (N, *S), or as many dimensions as ``x``,
                broadcastable to it. Other values may be anything, NaN included.
            sample_weight: Weights of the values, floating-point, not negative; shape (N,) or (N, *S).
            weighting: Meaning of the weights: ``"frequency"``, how often a value occurs, or ``"importance"``, how much
                it matters relative to the others. It changes :attr:`var_unbiased` only.

        Raises:
            TypeError: ``x`` or the weights are not floating-point tensors, or ``mask`` is not boolean.
            ValueError: ``x`` has fewer than two dimensions; ``mask`` or the weights do not fit; a weight is negative or
                not finite (checked on the CPU only); or there is no such weighting.

        Numerics:
            Two passes around a first estimate of the mean: accurate if the mean is 10⁶ times the standard deviation.
            Differentiable with respect to ``x``.
        """
        check_values(x)
        check_weighting("moments", weighting)
        wide, dims = wide_dtype(x.device), reduced_dims(x)
        values = x.to(wide)
        if sample_weight is not None:
            weights = broadcast_weight("moments", sample_weight, x).to(wide)
            if mask is not None:
                mask = broadcast_mask(mask, x)
                values, weights = torch.where(mask, values, 0), torch.where(mask, weights, 0)
            return _of_weighted(values, weights, weighting)
        if mask is None:
            count = torch.tensor(x.numel() // max(x.shape[1], 1), dtype=wide, device=x.device)
        else:
            mask = broadcast_mask(mask, x).expand_as(x)
            values = torch.where(mask, values, 0)
            count = mask.sum(dims).to(wide)
        divisor = count.clamp(min=1)
        center = values.detach().sum(dims) / divisor
        deviation = values - per_channel(center, x)
        if mask is not None:
            deviation = torch.where(mask, deviation, 0)
        correction = deviation.sum(dims) / divisor  # the rounding error of the center
        m2 = (deviation * deviation).sum(dims) - count * correction * correction
        return cls(count, center + correction, m2.clamp(min=0))

    def merge(self, *others: Moments) -> Moments:
        """The moments of all values together. The order matters only in rounding; empty parts change nothing.

        Raises:
            TypeError: An argument is not a :class:`Moments`.
            ValueError: The numbers of channels differ.
        """
        merged = self
        for other in others:
            merged = merged._merge_one(other)
        return merged

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """Merge one or more parts.

        Raises:
            TypeError: A part is not a :class:`Moments`.
            ValueError: There is no part, so the number of channels is unknown (start from :meth:`empty` instead).
        """
        if not isinstance(parts, Iterable):
            raise TypeError(f"merge_all takes several Moments; got {describe(parts)}")
        known = list(parts)
        if not known:
            raise ValueError("merge_all was given no moments; it needs at least one (Moments.empty(C) is neutral)")
        _check_moments(known[0])
        return known[0].merge(*known[1:])

    def _merge_one(self, other: Moments) -> Moments:
        _check_moments(other)
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments merge only with moments of as many channels: {self.mean.shape[0]} here, "
                f"{other.mean.shape[0]} there"
            )
        count = self.count + other.count
        share = other.count / count.where(count > 0, 1)
        delta = other.mean - self.mean
        # The mean 0 of an empty side must not count; share is then exactly 0 or 1.
        mean = torch.where(other.count > 0, self.mean + delta * share, self.mean)
        mean = torch.where(self.count > 0, mean, other.mean)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * share)
        if self.squares is None and other.squares is None:
            return Moments(count, mean, m2)
        return Moments(count, mean, m2, self._squares + other._squares)

    @property
    def _squares(self) -> Tensor:
        return self.count if self.squares is None else self.squares

    def all_reduce(
        self,
        process_group: ProcessGroup | None = None,
        *,
        what: str = "Moments.all_reduce",
        step: Callable[[], Step] | None = None,
    ) -> Moments:
        """The moments of all ranks' values together, bitwise equal on all ranks.

        All ranks of the group call it, with equally many channels; a rank without values has :meth:`empty` moments. One
        collective of 4·C values; the parts are merged pairwise in the ranks' order. Without torch.distributed, or with
        one rank, the result is the moments themselves.

        Args:
            process_group: The ranks; default: all.
            what: What was called, the first words of an error.
            step: What this rank is doing, for an error if the ranks differ.

        Raises:
            RuntimeError: A gradient is asked for (``kn.SyncBatchNorm`` is differentiable, this is not); a rank does not
                take part; or, on the CPU, the ranks have different numbers of channels (an error on all of them).
            ValueError: This process is not in the group.
        """
        if torch.is_grad_enabled() and any(part.requires_grad for part in (self.count, self.mean, self.m2)):
            raise RuntimeError(f"{what}: moments lose their gradient between ranks; take them under torch.no_grad()")
        members = group_of(process_group, what)
        if members is None:
            return self
        # With squares always, so that ranks with and without weights send equally much.
        counts = self.count.expand_as(self.mean), self._squares.expand_as(self.mean)
        packed = torch.stack([counts[0], self.mean, self.m2, counts[1]])
        rows = gather(packed, members, what, step).unbind(1)  # count, mean, m2, squares of (ranks, C) each
        while (half := rows[0].shape[0] // 2) > 0:
            merged = Moments(*(r[:half] for r in rows)).merge(Moments(*(r[half : 2 * half] for r in rows)))
            rest = [r[2 * half :] for r in rows]
            parts = merged.count, merged.mean, merged.m2, merged._squares
            rows = tuple(map(torch.cat, zip(parts, rest, strict=True)))
        return Moments(*(r[0] for r in rows))

    @property
    def var(self) -> Tensor:
        """Biased variance m2 / count, which normalizes; NaN without values."""
        return self.m2 / self.count

    @property
    def var_or_zero(self) -> Tensor:
        """As :attr:`var`, but 0 without values."""
        return self.m2 / self.count.where(self.count > 0, 1)

    @property
    def var_unbiased(self) -> Tensor:
        """Unbiased variance, which running statistics hold; NaN if there are too few values.

        m2 / (count − 1); with importance weights m2 / (Σw − Σw²/Σw), which is the same if all weights are 1.
        """
        freedom = degrees_of_freedom(self.count, self.squares)
        return self.m2 / freedom.where(freedom > 0, torch.nan)

    def __repr__(self) -> str:
        count = f"{self.count.item():g}" if self.count.dim() == 0 else f"{self.count.tolist()}"
        return f"Moments(channels={self.mean.shape[0]}, count={count}, device={self.mean.device})"


def degrees_of_freedom(count: Tensor, squares: Tensor | None) -> Tensor:
    """The divisor of m2 for the unbiased variance: n − 1, or Σw − Σw²/Σw; 0 if there is no variance."""
    if squares is None:
        return (count - 1).where(count >= LEAST_FREQUENCY, 0)
    lost = squares / count.where(count > 0, 1)
    # For a single weight only the rounding of the quotient is left.
    return (count - lost).where(lost < count * (1 - 8 * torch.finfo(count.dtype).eps), 0)


def _of_weighted(values: Tensor, weights: Tensor, weighting: Weighting) -> Moments:
    """The moments of values (N, C, *S) with broadcastable weights; both are 0 where a mask is False."""
    dims = reduced_dims(values)
    common = weights.shape[1] == 1
    weights = weights.expand(values.shape[0], -1, *values.shape[2:])
    count = weights.sum() if common else weights.sum(dims)
    divisor = count.where(count > 0, 1)
    share = weights / (divisor if common else per_channel(divisor, values))
    center = (share * values).detach().sum(dims)
    deviation = values - per_channel(center, values)
    correction = (share * deviation).sum(dims)
    m2 = (weights * deviation * deviation).sum(dims) - count * correction * correction
    squares = None
    if weighting == "importance":
        squares = weights.square().sum() if common else weights.square().sum(dims)
    return Moments(count, center + correction, m2.clamp(min=0), squares)


def _check_moments(value: object) -> None:
    if not isinstance(value, Moments):
        raise TypeError(f"moments merge with Moments, such as Moments.from_tensor(x); got {describe(value)}")
