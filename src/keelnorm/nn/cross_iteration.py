"""Cross-iteration batch normalization: the last batches normalize together, corrected for changed weights."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keelnorm import functional
from keelnorm.engine.activations import Activation, ActivationLike
from keelnorm.engine.arguments import Padding
from keelnorm.engine.error_messages import describe
from keelnorm.engine.layout import per_channel
from keelnorm.engine.recomputation import is_second_run
from keelnorm.moments import Moments, Weighting, compute_dtype
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.recent_batches import Recall, WindowedVariant, has_values, runs_eagerly

_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


class _Slopes(NamedTuple):
    """Derivatives of a batch's moments by the producer's weight θ at that time: ∂mean/∂θ and ∂var/∂θ."""

    weight: Tensor
    mean: Tensor
    var: Tensor


class CrossIterationBatchNorm(WindowedVariant):
    """Batch normalization with the moments of the last batches, corrected for the change of the weights since.

    Let θ be the weight of the layer that produces x (a convolution or a linear layer). For the batch of τ iterations
    ago, per channel and to first order,

        mean_τ(θ_t) = mean_τ + ∂mean_τ/∂θ · (θ_t − θ_{t−τ})        ν_τ(θ_t) = ν_τ + ∂ν_τ/∂θ · (θ_t − θ_{t−τ})

    with ν = E[x²]. The window τ = 0 … k − 1 normalizes:

        mean = 1/k·Σ mean_τ(θ_t)        var = 1/k·Σ max(ν_τ(θ_t), mean_τ(θ_t)²) − mean²
        y = act((x − mean) / √(var + eps) · weight + bias + residual)

    The gradient flows through the current batch's moments (τ = 0) only. The layer learns its producer once, by
    :meth:`attach`, or its weight at each call, as ``layer(x, producer_weight=conv.weight)``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As for ``torch.nn.BatchNorm2d``.
            Without running statistics nothing is kept between batches: the layer is then batch normalization.
        window: k, the number of batches that normalize together, including the current one. Default 8.
        burn_in: Number of batches, at the start of training, that are normalized alone, as weights change fast then.
            Default 0.
        compensate: Whether moments are corrected for changed weights. False is the paper's "naive CBN", which needs no
            producer.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        The running statistics are updated in training with the batch's own moments, as in ``torch.nn.BatchNorm2d``; the
        state_dict is the same too. It does not contain the window, which is empty after loading and fills again. A
        forward without gradients (``no_grad``; the first run of a reentrant checkpoint) uses the window but adds
        nothing to it, as ∂mean/∂θ is unknown; nor does an empty batch. In evaluation the running statistics normalize.

    Differs:
        From the paper if batches differ in size: each counts by its number of values. A bias of the producer is not
        part of θ: the normalization removes it, so do without it. A channel that is not finite in one batch of the
        window is left out of that batch. A producer that does not train is taken to be constant.

    Numerics:
        Moments in float64, merged by Chan's formula: ν_τ(θ_t) − mean_τ(θ_t)² is computed as
        var_τ + ∂var_τ/∂θ·Δθ − (∂mean_τ/∂θ·Δθ)², the same number without the cancellation.

    Cost:
        In training two more weight gradients of the producer per forward, and three tensors of its weight's size for
        each batch of the window. Under a checkpoint that is not reentrant the segment runs two more times in the
        forward. In evaluation that of batch normalization.

    Raises:
        TypeError, ValueError: The input can't be normalized; the producer is unknown, or did not produce x. All state
            is then as before.
        RuntimeError: The layer runs under ``torch.jit`` or ``torch.compile(fullgraph=True)``: its forward
            differentiates.

    Example:
        >>> conv, norm = torch.nn.Conv2d(3, 8, 3, bias=False), CrossIterationBatchNorm(8, window=4)
        >>> net = torch.nn.Sequential(conv, norm.attach(conv))
        >>> net(torch.randn(2, 3, 8, 8)).shape, len(norm.state_dict())
        (torch.Size([2, 8, 6, 6]), 5)

    Source:
        Yao, Cao, Zheng, Huang, Lin (2021), "Cross-Iteration Batch Normalization", arXiv:2002.05712, section 3.
    """

    takes_mask = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: int = 8,
        burn_in: int = 0,
        compensate: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, window, burn_in)
        self.compensate = compensate
        # A tuple, so that torch.nn does not make it a submodule; copied and pickled with the model around it.
        self._producer: tuple[torch.nn.Module, ...] = ()
        self._given: Tensor | None = None

    def attach(self, producer: torch.nn.Module) -> CrossIterationBatchNorm:
        """Set the module whose output is normalized: a convolution or linear layer, which does not become a submodule.

        Raises:
            TypeError, ValueError: It is transposed, or has no weight whose first dimension is the output channel.
        """
        if isinstance(producer, _TRANSPOSED):
            raise TypeError(f"{type(self).__name__}: a transposed convolution can't be attached; got {producer}")
        weight = getattr(producer, "weight", None)
        if not isinstance(producer, torch.nn.Module) or weight is None:
            raise TypeError(
                f"{type(self).__name__}: attach takes the module in front, a convolution or a linear layer; "
                f"got {describe(producer)}"
            )
        self._check_weight(weight)
        self._producer = (producer,)
        return self

    def reset_window(self) -> None:
        """Empty the window."""
        self._last: deque[tuple[Moments, _Slopes | None]] = deque(maxlen=self.window - 1)
        self._recall: Recall[Moments | None] = Recall(maxlen=self._recalled)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: ActivationLike = None,
        inplace: bool = False,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weighting: Weighting = "frequency",
        padding: Padding = "zero",
        producer_weight: Tensor | None = None,
    ) -> Tensor:
        """Compute ``activation(bn(x) + residual)``.

        ``producer_weight`` is the weight that produced x, with the output channel first; it replaces that of the
        attached module for this call. The other arguments are as for every variant.
        """
        if producer_weight is not None:
            self._check_weight(producer_weight)
        self._given = producer_weight
        try:
            return super().forward(
                input, residual, activation=activation, inplace=inplace, mask=mask, sample_weight=sample_weight,
                weighting=weighting, padding=padding,
            )  # fmt: skip
        finally:
            self._given = None

    @runs_eagerly
    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize with the moments of the window."""
        own = functional.moments(x.detach(), mask)
        batch = Moments(own.count, *_Derived.apply(x, mask, own))
        pools = self.pools() and self.window > 1 and self.running_mean is not None
        weight = self._weight() if pools and self.compensate else None
        key = torch.stack([own.mean, own.m2])
        found = self._recall.find(key) if is_second_run() else None
        earlier = found[0] if found else self._earlier(weight) if pools else None
        adds = pools and self.counts() and has_values(x, mask)
        slopes = None
        if adds and weight is not None and weight.requires_grad:
            adds = torch.is_grad_enabled()
            slopes = self._slopes(x, own, mask, weight) if adds else None
        moments = batch if earlier is None else batch.merge(earlier)
        var = moments.m2 / moments.count.clamp(min=1)
        y = normalize(x, moments.mean, var, self.weight, self.bias, self.eps, residual, act)
        if self.counts():
            self._recall.append((key, earlier))
        if adds:
            self._last.append((own, slopes))
        self.update_running(own)
        return y

    def _earlier(self, weight: Tensor | None) -> Moments | None:
        """The merged moments of the window's earlier batches, corrected for the present weight."""
        parts = [_corrected(weight, *batch) for batch in self._last]
        return Moments.merge_all(parts) if parts else None

    def _slopes(self, x: Tensor, batch: Moments, mask: Tensor | None, weight: Tensor) -> _Slopes:
        """The derivatives of the batch's moments by the weight."""
        # ∂mean/∂x = 1/M and ∂var/∂x = 2(x − mean)/M, as two factors √M, so that float16 neither over- nor underflows.
        # A channel depends only on its own rows of the weight, so one product gives the derivatives of all channels.
        scale = batch.count.clamp(min=1).rsqrt().to(compute_dtype(x))
        share = scale.expand(x.shape[1])
        dmean = per_channel(share, x).expand_as(x)
        values = x.detach().to(share.dtype)
        dvar = 2 * (values - per_channel(batch.mean.to(share.dtype), x)) * per_channel(share, x)
        if mask is not None:
            dmean, dvar = torch.where(mask, dmean, 0), torch.where(mask, dvar, 0)
        slopes = []
        for cotangent in (dmean, dvar):
            slope = None
            if x.requires_grad:
                (slope,) = torch.autograd.grad(x, weight, cotangent.to(x.dtype), retain_graph=True, allow_unused=True)
            if slope is None:
                raise ValueError(
                    f"{type(self).__name__}: x does not come from the producer's weight ({describe(weight)}): attach "
                    "the module whose output this layer normalizes. A parametrized weight is a new tensor at every "
                    "access: run the model within torch.nn.utils.parametrize.cached()"
                )
            rows = slope.detach().to(share.dtype).reshape(x.shape[1], -1)
            slopes.append(rows * share.view(-1, 1))
        return _Slopes(weight.detach().clone(), *slopes)

    def _weight(self) -> Tensor:
        """The producer's present weight."""
        if self._given is not None:
            return self._given
        if not self._producer:
            raise ValueError(
                f"{type(self).__name__}: the moments of earlier batches are corrected for changed weights, so the "
                "module in front must be known: layer.attach(conv) once, or layer(x, producer_weight=conv.weight) at "
                "each call; compensate=False does without"
            )
        weight = self._producer[0].weight
        assert isinstance(weight, Tensor)  # attach saw to it
        return weight

    def _check_weight(self, weight: Any) -> None:
        if not isinstance(weight, Tensor) or weight.dim() < 2 or weight.shape[0] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: the weight of what produces x must be a tensor with {self.num_features} "
                f"output channels as its first of two or more dimensions; got {describe(weight)}"
            )

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{super().extra_repr()}, compensate={self.compensate}"


class _Derived(torch.autograd.Function):
    """Gives the known mean and m2 of x their derivatives: ∂mean/∂x = 1/M, ∂m2/∂x = 2(x − mean)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, moments: Moments) -> tuple[Tensor, Tensor]:
        mean = moments.mean.clone()
        ctx.save_for_backward(x, mask, mean, moments.count)
        return mean, moments.m2.clone()

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dm2: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, mean, count = ctx.saved_tensors
        dtype = compute_dtype(x)
        share = per_channel((dmean / count.clamp(min=1)).to(dtype), x)
        centered = x.to(dtype) - per_channel(mean.to(dtype), x)
        dx = share + centered * per_channel((2 * dm2).to(dtype), x)
        return (dx if mask is None else torch.where(mask, dx, 0)).to(x.dtype), None, None


def _corrected(weight: Tensor | None, batch: Moments, slopes: _Slopes | None) -> Moments:
    """An earlier batch's moments, corrected for this weight; channels that are not finite are empty."""
    mean, var = batch.mean, batch.m2 / batch.count.clamp(min=1)
    if weight is not None and slopes is not None:
        dtype = slopes.mean.dtype
        step = (weight.detach().to(dtype) - slopes.weight.to(dtype)).reshape(mean.shape[0], -1)
        shift = (slopes.mean * step).sum(1).to(mean.dtype)
        mean = mean + shift
        # ν − mean² at the present weight; a negative value becomes 0, which is the paper's maximum.
        var = (var + (slopes.var * step).sum(1).to(var.dtype) - shift * shift).clamp(min=0)
    good = mean.isfinite() & var.isfinite()
    count = torch.where(good, batch.count, 0)
    return Moments(count, torch.where(good, mean, 0), torch.where(good, var, 0) * count)
