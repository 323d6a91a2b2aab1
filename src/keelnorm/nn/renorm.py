"""Batch renormalization: the batch's statistics, corrected towards the running statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.error_messages import describe
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.running_statistics import averaged
from keelnorm.functional import moments as moments_of
from keelnorm.moments import Moments, compute_dtype
from keelnorm.nn._shared.variant import Variant

#: A bound, or a function of the number of batches so far (an integer tensor of shape ()) that returns it.
Bound = float | Callable[[Tensor], Tensor]
#: What ``running_var`` averages.
Average: TypeAlias = Literal["variance", "std"]
#: Number of forwards whose corrections are kept for a checkpoint's second run.
_REMEMBERED = 8


@dataclass(frozen=True)
class LinearRamp:
    """A schedule: ``initial`` up to step ``begin``, ``final`` from step ``end`` on, and a straight line between.

    Args:
        initial, final: Values before and after.
        begin, end: Steps, begin < end.

    Raises:
        ValueError: ``begin`` is not below ``end``.

    Example:
        >>> LinearRamp(1.0, 3.0, 5_000, 40_000)(torch.tensor(22_500)).item()
        2.0
    """

    initial: float
    final: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not self.begin < self.end:
            raise ValueError(f"LinearRamp: begin must be below end; got begin={self.begin!r}, end={self.end!r}")

    def __call__(self, step: Tensor) -> Tensor:
        """The value at a step, on the step's device; nothing waits for the device."""
        share = ((step.to(torch.float32) - self.begin) / (self.end - self.begin)).clamp(0, 1)
        return self.initial + (self.final - self.initial) * share


#: The paper's schedules (section 4): plain batch norm for 5,000 steps, then a growing correction.
PAPER_R_MAX = LinearRamp(1.0, 3.0, 5_000, 40_000)
PAPER_D_MAX = LinearRamp(0.0, 5.0, 5_000, 25_000)


class BatchRenorm(Variant):
    """Batch renormalization: values as with the running statistics, within bounds; gradients through the batch's.

    Per channel, with the batch's mean μ_B and σ_B = √(var_B + eps) (biased), the running μ and
    σ = √(running_var + eps):

        r = clip(σ_B / σ, 1/r_max, r_max)        d = clip((μ_B − μ) / σ, −d_max, d_max)
        y = act(((x − μ_B) / σ_B · r + d) · weight + bias + residual)

    r and d are constants for the gradient. If neither is clipped, y = (x − μ)/σ·weight + bias: training and evaluation
    then compute the same function of x. With r_max = 1 and d_max = 0 this is batch normalization.

    Args:
        num_features: Number of channels C.
        r_max: Bound of r, at least 1: a number, or a function of ``num_batches_tracked`` (a tensor, whose value must
            not be read: no ``item()``, no ``if``). Default: the paper's, 1 up to step 5,000, then rising to 3 at step
            40,000.
        d_max: Bound of d, at least 0, as r_max. Default: the paper's, 0 up to step 5,000, then rising to 5 at 25,000.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; the paper takes 0.01. None averages over all batches.
        affine: Whether there are a learnable weight and bias.
        track_running_stats: Whether there are running statistics; without them there is no correction, and the layer is
            a batch normalization.
        device, dtype: Of the parameters and buffers.
        average: What ``running_var`` averages. ``"variance"``: the unbiased variance, as in ``torch.nn``'s layers.
            ``"std"``: the standard deviation σ_B, as in the paper: σ ← σ + momentum·(σ_B − σ). ``running_var`` then
            holds σ² − eps, so that evaluation, and any tool that reads it, divides by σ.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        As ``torch.nn.BatchNorm2d``'s, with the same keys. The running statistics are updated after the batch was
        normalized.

    Differs:
        From ``torch.nn.BatchNorm*`` in training, by r and d. From the paper in the default of ``average``: averaged
        standard deviations of small batches are too small, biased ones more so; averaged unbiased variances are not.

    Numerics:
        r and d in float64 (float32 on devices without it). The second run of activation checkpointing uses r and d of
        the first run, if at most 8 batches went through the layer between a forward and its backward.

    Cost:
        In training one more pass over x than batch normalization, for the moments; none in evaluation. y is a fused
        batch normalization with weight·r and bias + weight·d.

    Raises:
        TypeError, ValueError: The input can't be normalized, or a bound is out of its range.

    Example:
        >>> layer = BatchRenorm(3, r_max=3.0, d_max=5.0)
        >>> layer(torch.randn(4, 3, 8, 8), activation="relu").shape
        torch.Size([4, 3, 8, 8])

    Source:
        Ioffe (2017), "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv:1702.03275, algorithm 1 and section 4.
    """

    r_max: Bound
    d_max: Bound
    average: Average

    def __init__(
        self,
        num_features: int,
        r_max: Bound = PAPER_R_MAX,
        d_max: Bound = PAPER_D_MAX,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        average: Average = "variance",
    ) -> None:
        if average not in get_args(Average):
            raise ValueError(f"BatchRenorm: average must be one of {get_args(Average)}; got {describe(average)}")
        _check_bound("r_max", r_max, 1)
        _check_bound("d_max", d_max, 0)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.r_max, self.d_max, self.average = r_max, d_max, average
        self._recent: deque[tuple[Tensor, ...]] = deque(maxlen=_REMEMBERED)

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize with the batch's moments, corrected by r and d."""
        if self.running_mean is None or self.running_var is None:
            return self.normalize_running(x, residual, act)  # with the batch's moments
        moments = moments_of(x.detach())
        r, d = self._corrections(moments)
        dtype = compute_dtype(x)
        r, d = r.to(dtype), d.to(dtype)
        weight, bias = r, d
        if self.weight is not None:
            weight, bias = self.weight.to(dtype) * r, self.weight.to(dtype) * d
        if self.bias is not None:
            bias = self.bias.to(dtype) + bias
        y = dispatch.batch_norm(x, residual, weight, bias, self._state(), act)
        self.update_running(moments)
        return y

    @torch.no_grad()
    def _corrections(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """The corrections r and d, (C,); in a checkpoint's second run those of the first run."""
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = moments.mean.dtype
        var = moments.m2 / moments.count.clamp(min=1)
        sigma = (self.running_var.to(wide) + self.eps).sqrt()
        r_max, d_max = self._bound(self.r_max, moments.mean), self._bound(self.d_max, moments.mean)
        r = torch.clamp((var + self.eps).sqrt() / sigma, 1 / r_max, r_max)
        d = torch.clamp((moments.mean - self.running_mean.to(wide)) / sigma, -d_max, d_max)
        if torch.compiler.is_compiling():  # the compiler traces a checkpoint's forward once
            return r, d
        if is_second_run():
            for mean, m2, first_r, first_d in self._recent:
                if mean.device == r.device:
                    same = (mean == moments.mean) & (m2 == moments.m2)
                    r, d = torch.where(same, first_r, r), torch.where(same, first_d, d)
        else:
            self._recent.append((moments.mean, moments.m2, r, d))
        return r, d

    def _bound(self, bound: Bound, like: Tensor) -> Tensor:
        if callable(bound):
            assert self.num_batches_tracked is not None
            return bound(self.num_batches_tracked).to(like)
        return torch.full((), float(bound), dtype=like.dtype, device=like.device)

    def averaged_var(self, running: Tensor, biased: Tensor, unbiased: Tensor, momentum: float | Tensor) -> Tensor:
        """Average what ``average`` says."""
        if self.average == "variance":
            return super().averaged_var(running, biased, unbiased, momentum)
        old, new = ((var + self.eps).sqrt() for var in (running, biased))
        return averaged(old, new, momentum).square() - self.eps

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, average={self.average!r}"


def _check_bound(name: str, bound: Bound, least: float) -> None:
    if not callable(bound) and not (isinstance(bound, int | float) and bound >= least):
        raise ValueError(
            f"BatchRenorm: {name} must be a number of at least {least}, or a callable that gives one from the number "
            f"of batches so far; got {describe(bound)}"
        )
