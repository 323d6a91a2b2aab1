"""Whitening batch normalization: removes the correlations between channels too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.composite import finished
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.layout import is_channels_last
from keelnorm.engine.running_statistics import averaged_so_far, note_averaged
from keelnorm.engine.update_counts import UpdateCounts
from keelnorm.moments import Moments, compute_dtype, wide_dtype
from keelnorm.nn._shared.inverse_sqrt import newton, zca
from keelnorm.nn._shared.variant import Variant

Method: TypeAlias = Literal["newton", "zca"]
METHODS = get_args(Method)


class WhiteningBatchNorm(Variant):
    """Batch normalization with the covariance matrix of a group of channels instead of each channel's variance.

    For the D channels x of a group at one position, over the M = N·S positions of the batch:

        mean = Σx / M,   cov = Σ(x − mean)(x − mean)ᵀ / M                                  (biased)
        y = act(weight · (cov + eps·I)^(−1/2) · (x − mean) + bias + residual)

    The output's channels have variance 1 and no correlation within a group. Of all matrices with this property the
    symmetric one changes x least (ZCA), and its axes do not rotate from batch to batch.

    Args:
        num_features: Number of channels C.
        eps: Added to the diagonal of the covariance. Default 1e-5.
        momentum: Weight of the batch in the running statistics; None averages over all batches. Default 0.1.
        affine: Whether there are a learnable weight and bias, one per channel. Default True.
        track_running_stats: Whether there are running statistics; without them the batch normalizes in evaluation too.
        device, dtype: Of the parameters and buffers.
        bias: Whether affine includes a bias. Default True.
        group_size: Number D of adjacent channels that are whitened together. It must divide C, or be larger, which
            means C. 1 is plain batch normalization. The batch needs more than D positions. Default 64.
        method: ``"newton"``, Newton's iteration, which approximates the inverse root and leaves directions of very
            small variance below 1; or ``"zca"``, the eigendecomposition, which is exact. Default ``"newton"``.
        iterations: Number of Newton iterations, at least 1; no effect on ``"zca"``. Default 5.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        torch.nn's, and ``running_cov`` of shape (C/D, D, D), initially I: the running covariance, unbiased, updated
        with the other statistics. Evaluation whitens with it; ``running_var`` holds the variances, as in a plain layer.
        A value that is not finite leaves its group's ``running_cov`` as it was.

    Differs:
        From the papers, which keep a running average of the whitening matrix: covariances can be averaged and merged,
        their inverse roots can't. A mask is refused.

    Numerics:
        Covariances of centered values are summed in float32 (float64 for float64); the root is taken in float64.
        Autocast has no effect inside. First and second derivatives are exact, for equal eigenvalues too.

    Cost:
        On top of batch normalization 2·D multiplications per value in training, D in evaluation; and in both 3·T
        products of D×D matrices per group, or an eigendecomposition. Saved: the centered values.

    Raises:
        ValueError: The group size does not divide C, the method is unknown, or the number of iterations is illegal;
            else as :class:`keelnorm.BatchNorm`.

    Example:
        >>> x = torch.randn(1000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.1]])
        >>> torch.allclose(WhiteningBatchNorm(2, method="zca")(x).T.cov(), torch.eye(2), atol=0.01)
        True

    Source:
        Huang, Yang, Lang, Deng (2018), "Decorrelated Batch Normalization", arXiv:1804.08450, algorithm 1 (``"zca"``).
        Huang, Zhou, Zhu, Liu, Shao (2019), "Iterative Normalization: Beyond Standardization towards Efficient
        Whitening", arXiv:1904.03441, algorithm 1 (``"newton"``).
    """

    own_scale: str | None = "covariances beside running_var"
    own_evaluation: str | None = "with the covariances of groups of channels"
    running_cov: Tensor | None

    group_size: int
    method: Method

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
        bias: bool = True,
        group_size: int = 64,
        method: Method = "newton",
        iterations: int = 5,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"WhiteningBatchNorm: method must be one of {METHODS}; got {describe(method)}")
        if not is_count(iterations):
            raise ValueError(f"WhiteningBatchNorm: iterations must be a positive integer; got {describe(iterations)}")
        if not is_count(group_size) or num_features % min(group_size, num_features):
            legal = [size for size in range(1, num_features + 1) if num_features % size == 0]
            raise ValueError(
                f"WhiteningBatchNorm: group_size must divide num_features={num_features}, or be larger; got "
                f"{describe(group_size)}. Use one of {legal}"
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.group_size = min(group_size, num_features)
        self.method = method
        self.iterations = iterations
        groups = num_features // self.group_size
        identity = torch.eye(self.group_size, device=device, dtype=dtype).repeat(groups, 1, 1)
        self.register_buffer("running_cov", identity if track_running_stats else None)
        self._cov_updates = UpdateCounts()  # a count per group

    def reset_running_stats(self) -> None:
        """As torch.nn's; ``running_cov`` becomes I."""
        super().reset_running_stats()
        running_cov = self._buffers.get("running_cov")  # not yet set in torch.nn's constructor
        if running_cov is not None:
            running_cov.copy_(torch.eye(self.group_size))

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        iterations = f", iterations={self.iterations}" if self.method == "newton" else ""
        return f"{super().extra_repr()}, group_size={self.group_size}, method={self.method!r}{iterations}"

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Whiten with the batch's covariances."""
        with torch.autocast(x.device.type, enabled=False):
            values = self._grouped(x)
            count = values.shape[-1]
            # Centered twice, so that the covariance stays accurate when the mean is large.
            center = values.detach().sum(-1, keepdim=True) / max(count, 1)
            values = values - center
            rest = values.sum(-1, keepdim=True) / max(count, 1)
            values = values - rest
            cov = values @ values.mT / max(count, 1)
            y = self._whiten(values, cov, x, residual, act)
        with torch.no_grad():
            wide = wide_dtype(x.device)
            self._update(count, (center.to(wide) + rest.to(wide)).flatten(), cov.to(wide))
        return y

    def normalize_running(self, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
        """Whiten with the running covariances."""
        assert self.running_mean is not None
        assert self.running_cov is not None
        with torch.autocast(x.device.type, enabled=False):
            values = self._grouped(x)
            values = values - self.running_mean.to(values.dtype).view(-1, self.group_size, 1)
            return self._whiten(values, self.running_cov, x, residual, act)

    def whitening(self, cov: Tensor) -> Tensor:
        """Compute (cov + eps·I)^(−1/2) by the layer's method, for matrices of shape (..., D, D)."""
        cov = cov + self.eps * torch.eye(self.group_size, dtype=cov.dtype, device=cov.device)
        return zca(cov, self.eps) if self.method == "zca" else newton(cov, self.iterations)

    def _whiten(self, values: Tensor, cov: Tensor, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
        """The layer's output for centered values (C/D, D, M)."""
        matrix = self.whitening(cov.to(wide_dtype(x.device)))
        if self.weight is not None:
            matrix = self.weight.view(-1, self.group_size, 1) * matrix
        y = matrix.to(values.dtype) @ values
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).view(-1, self.group_size, 1)
        return finished(_ungrouped(y, x), x, residual, act)

    def _grouped(self, x: Tensor) -> Tensor:
        """View (N, C, *S) as (C/D, D, M); a copy unless x is channels-last."""
        if x.shape[1] != self.num_features:
            raise ValueError(f"{type(self).__name__}: x must have {self.num_features} channels; got {describe(x)}")
        count = x.numel() // self.num_features
        groups = self.num_features // self.group_size
        return x.to(compute_dtype(x)).movedim(1, 0).reshape(groups, self.group_size, count)

    def _update(self, count: int, mean: Tensor, cov: Tensor) -> None:
        m2 = cov.diagonal(dim1=-2, dim2=-1).flatten() * count
        number = torch.tensor(count, dtype=mean.dtype, device=mean.device)
        self.update_running(Comoments(number, mean, m2, products=cov * count))

    def enter(self, moments: Moments, momentum: float | None) -> None:
        """Update the running statistics and covariances."""
        super().enter(moments, momentum)
        if self.running_cov is None:
            return
        assert isinstance(moments, Comoments)
        batches, groups, products = self.num_batches_tracked, self.running_cov[:, 0, 0], moments.products
        enough = moments.count > 1
        factor: float | Tensor | None = momentum
        if factor is None:
            assert batches is not None
            counts = self._cov_updates.beside(groups)
            so_far = averaged_so_far(batches - enough.to(batches.dtype), counts)  # the present batch is counted already
            factor = (1 / (so_far + 1).to(products.dtype))[:, None, None]
        with torch.no_grad():
            running = self.running_cov.to(products.dtype)
            cov = products / (moments.count - 1).clamp(min=1)
            new = (running + (cov - running) * factor).to(self.running_cov.dtype)
            good = new.isfinite().flatten(1).all(-1) & enough
            if momentum is None and batches is not None:
                note_averaged(counts, so_far, good, batches)
            self.running_cov.copy_(torch.where(good[:, None, None], new, self.running_cov))


@dataclass(frozen=True, eq=False)
class Comoments(Moments):
    """Moments with the sums of products of deviations within each group of D channels; these merge too.

    Attributes:
        products: Σ(v − mean)(v − mean)ᵀ, shape (C/D, D, D).
    """

    products: Tensor = field(kw_only=True)

    def _merge_one(self, other: Moments) -> Comoments:
        assert isinstance(other, Comoments)
        merged = super()._merge_one(other)
        delta = (other.mean - self.mean).view(len(self.products), -1, 1)
        # If one side is empty, the weight is 0.
        weight = self.count * other.count / merged.count.clamp(min=1)
        products = self.products + other.products + weight * (delta @ delta.mT)
        return Comoments(merged.count, merged.mean, merged.m2, products=products)


def _ungrouped(y: Tensor, x: Tensor) -> Tensor:
    """Reshape (C/D, D, M) to (N, C, *S); channels-last if x is, else contiguous."""
    y = y.reshape(x.shape[1], x.shape[0], *x.shape[2:])
    if is_channels_last(x) and not x.is_contiguous():
        return y.movedim(0, -1).contiguous().movedim(-1, 1)
    return y.movedim(0, 1).contiguous()
