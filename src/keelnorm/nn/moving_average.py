"""Moving average batch normalization: statistics of forward and backward are averaged over the last batches."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from keelnorm import functional
from keelnorm.engine.activations import Activation
from keelnorm.engine.error_messages import describe
from keelnorm.engine.layout import per_channel
from keelnorm.engine.recomputation import is_second_run
from keelnorm.moments import Moments, compute_dtype
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.recent_batches import Recall, WindowedVariant, has_values, runs_eagerly

_CENTERABLE = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class MovingAverageBatchNorm(WindowedVariant):
    """Batch normalization by the root mean square, averaged over the last batches, as is the backward's statistic.

    The mean is not subtracted; :func:`center_weights` keeps it small. Per channel, over the M = N·S values of batch t:

        χ²_t = Σx²/M          χ̄² = mean of χ²_{t−m+1} … χ²_t            (simple moving average)
        r = clip(χ̄/χ̂, 1/r_max, r_max)                                    (no gradient)
        y = act(r·x/χ̄ · weight + bias + residual)                         with χ̄ = √(χ̄² + eps)
        χ̂² ← (1 − momentum)·χ̂² + momentum·χ²_t                            (exponential moving average)

    and in the backward, with g the gradient at z = x/χ̄:

        Ψ_t = Σ g·z/M         Ψ̄ = mean of the last m of Ψ                dx = (g − z·Ψ̄)/χ̄

    Ψ is the batch statistic in the backward of batch normalization. With m = 1, and during the burn-in, dx is the
    derivative of the forward. With m > 1 it is, by design, not the gradient of any one batch's loss. In evaluation
    y = act(x/√(χ̂² + eps)·weight + bias + residual).

    Args:
        num_features, eps, affine, track_running_stats, device, dtype: As for ``torch.nn.BatchNorm2d``. Without running
            statistics nothing is kept between batches, and m = 1.
        momentum: The momentum of χ̂²; the paper's 1 − α. Default 0.02.
        window: m, the number of batches that are averaged. Default 16.
        burn_in: Number of batches, at the start of training, that are normalized alone, with r = 1. Default 100.
        r_max: λ, the upper bound of r; 1/r_max is the lower bound. At least 1. Default 1.05.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        ``running_var`` is χ̂², the mean square; ``running_mean`` stays 0, and a loaded one decays to 0 in training. The
        state_dict is that of ``torch.nn.BatchNorm2d``; it does not contain the two windows, which are empty after
        loading and fill again. An empty batch adds nothing to them.

    Differs:
        From the authors' code: χ̂² averages each batch's χ² instead of χ̄²; a window that is not full yet is averaged
        over its batches; r is bounded by 1.05 instead of 5, from the end of the burn-in on. A channel that is not
        finite in a batch is left out of the averages.

    Numerics:
        χ² and Ψ in float64.

    Cost:
        In training one pass over x for χ², as in batch normalization, and its gradient; 2·m vectors. In evaluation that
        of batch normalization.

    Raises:
        TypeError, ValueError: The input can't be normalized; all state is then as before.
        RuntimeError: The layer runs under ``torch.jit``, ``torch.func`` or ``torch.compile(fullgraph=True)``: its
            backward has state.

    Example:
        >>> conv = center_weights(torch.nn.Conv2d(3, 8, 3))
        >>> norm = MovingAverageBatchNorm(8, burn_in=0)
        >>> norm(conv(torch.randn(2, 3, 8, 8)), activation="relu").shape
        torch.Size([2, 8, 6, 6])

    Source:
        Yan, Wan, Zhang, Zhang, Wei, Sun (2020), "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
        Normalization", arXiv:2001.06838, section 4: SMAS in both directions, renormalization, weight centralization.
    """

    takes_mask = True
    own_scale: str | None = "the mean square about 0 in running_var"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: int = 16,
        burn_in: int = 100,
        r_max: float = 1.05,
    ) -> None:
        if not r_max >= 1:
            raise ValueError(f"{type(self).__name__}: r_max is a bound of at least 1; got {describe(r_max)}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, window, burn_in)
        self.r_max = r_max

    def reset_window(self) -> None:
        """Empty both windows."""
        self._squares: deque[Tensor] = deque(maxlen=self.window - 1)
        self._products: deque[Tensor] = deque(maxlen=self.window - 1)
        self._recall: Recall[tuple[Tensor, Tensor, bool]] = Recall(maxlen=self._recalled)

    @runs_eagerly
    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize with the averaged mean square."""
        moments = functional.moments(x.detach(), mask)
        count = moments.count.expand(x.shape[1])
        square = moments.m2 / count.clamp(min=1) + moments.mean.square()
        found = self._recall.find(square) if is_second_run() else None
        counts = self.counts() or found is not None
        if found:
            average, r, pools = found[0]
        else:
            pools = self.pools()
            # A batch without values is left out of the average; where it is alone, any value will do.
            current = torch.where(count > 0, square, torch.nan if pools and self._squares else 1)
            average = _finite_mean([*self._squares, current], current) if pools else current
            r = self._renormalization(average) if pools else torch.ones_like(average)
        counts = counts and has_values(x, mask)
        products = self._products if counts else None
        earlier = self._products if pools else ()
        var = _Averaged.apply(x, mask, average, count, self.eps, earlier, products)
        scale = r if self.weight is None else self.weight * r.to(compute_dtype(self.weight))
        y = normalize(x, torch.zeros_like(average), var, scale, self.bias, self.eps, residual, act)
        if counts and not found:
            self._recall.append((square, (average, r, pools)))
            self._squares.append(torch.where(count > 0, square, torch.nan))
            # The mean is known to be 0, so there is no loss of a degree of freedom: with a count of one more, the
            # unbiased variance is the mean square itself.
            one_more = torch.where(count > 0, count + 1, 0)
            self.update_running(Moments(one_more, torch.zeros_like(square), square * count))
        return y

    def _renormalization(self, average: Tensor) -> Tensor:
        if self.running_var is None:
            return torch.ones_like(average)
        r = ((average + self.eps) / (self.running_var.to(average.dtype) + self.eps)).sqrt()
        return r.clamp(1 / self.r_max, self.r_max)

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{super().extra_repr()}, r_max={self.r_max}"


class _Averaged(torch.autograd.Function):
    """Returns χ̄² of x; its backward uses Ψ̄ instead of the batch's Ψ.

    The gradient of :func:`normalize` by χ̄² is d = Σ g·x·(−½)(χ̄² + eps)^(−3/2) = −M·Ψ/(2(χ̄² + eps)). The second term of
    dx, −z·Ψ̄/χ̄, is −x·Ψ̄/(χ̄² + eps).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        average: Tensor,
        count: Tensor,
        eps: float,
        earlier: deque[Tensor] | tuple[()],
        products: deque[Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mask, average, count)
        ctx.eps, ctx.earlier, ctx.products = eps, earlier, products
        return average.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, average, count = ctx.saved_tensors
        square = average + ctx.eps
        product = -2 * square / count.clamp(min=1) * grad
        mean = _finite_mean([*ctx.earlier, product], product) if ctx.earlier else product
        if ctx.products is not None:
            ctx.products.append(torch.where(count > 0, product.detach(), torch.nan))
        dx = x.to(compute_dtype(x)) * per_channel((-mean / square).to(compute_dtype(x)), x)
        dx = dx if mask is None else torch.where(mask, dx, 0)
        return dx.to(x.dtype), None, None, None, None, None, None


def _finite_mean(batches: list[Tensor], current: Tensor) -> Tensor:
    """The mean of the finite values over the batches; the current value if none is finite."""
    stacked = torch.stack(batches)
    finite = stacked.isfinite()
    number = finite.sum(0)
    return torch.where(number > 0, torch.where(finite, stacked, 0).sum(0) / number.clamp(min=1), current)


class _CenteredWeight(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def center_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Center a layer's weight: subtract the mean of each output channel's weights wherever the weight is used.

        weight ← weight − mean over (in, *kernel)

    An input whose channels have equal means then gives an output of mean 0. This is a parametrization of
    ``torch.nn.utils.parametrize``: the layer is changed in place and returned, its state_dict has
    ``parametrizations.weight.original`` instead of ``weight``, and ``parametrize.remove_parametrizations(module,
    "weight")`` leaves the centered weight, for deployment.

    Args:
        module: ``torch.nn.Linear`` or ``torch.nn.Conv1d``, ``2d``, ``3d``.

    Raises:
        TypeError: Another module; the output channels of transposed convolutions are in another dimension.
        ValueError: The weight is centered already.

    Example:
        >>> conv = center_weights(torch.nn.Conv2d(3, 8, 3))
        >>> bool(conv.weight.sum((1, 2, 3)).abs().max() < 1e-5)
        True

    Source:
        Yan et al. (2020), arXiv:2001.06838, section 4.
    """
    if not isinstance(module, _CENTERABLE):
        names = ", ".join(kind.__name__ for kind in _CENTERABLE)
        raise TypeError(f"center_weights takes one layer of {names}; got {describe(module)}")
    if parametrize.is_parametrized(module, "weight") and any(
        isinstance(each, _CenteredWeight)
        for each in module.parametrizations["weight"]  # type: ignore[index]
    ):
        raise ValueError(f"center_weights: the weight of {module} is centered already")
    parametrize.register_parametrization(module, "weight", _CenteredWeight())
    return module
