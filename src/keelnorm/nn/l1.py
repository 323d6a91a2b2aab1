"""Batch normalization by a scale without squares: the mean absolute deviation, or the range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.layout import per_channel, reduced_dims
from keelnorm.moments import Moments
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.variant import Variant


class L1BatchNorm(Variant):
    r"""Batch normalization by the mean absolute deviation.

    Per channel, over the M = N·S values of the batch, or those where the mask is True:

        scale = √(π/2) · Σ|x − mean| / M,   y = act((x − mean) / √(scale² + eps) · weight + bias + residual)

    For Gaussian values the factor √(π/2) makes the scale an estimate of the standard deviation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As ``torch.nn.BatchNorm2d``.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        torch.nn's. ``running_var`` holds the square of the scale, times M/(M − 1) as for a variance, so evaluation and
        folding, which use the buffers as mean and variance, are right.

    Differs:
        From ``torch.nn.BatchNorm*`` by the scale in training. The call takes a ``mask``.

    Numerics:
        Sums in float64. The derivative of \|v\| at 0 is taken as 0. A constant channel gives 0, with gradients.

    Cost:
        Plain torch, with several passes over x: the layer is for its statistics, not for speed. Evaluation is fused.

    Raises:
        TypeError, ValueError: As :class:`keelnorm.BatchNorm`.

    Example:
        >>> L1BatchNorm(1, eps=1e-12)(torch.tensor([[0.0], [2.0]])).flatten()
        tensor([-0.7979,  0.7979], grad_fn=<ViewBackward0>)

    Source:
        Hoffer, Banner, Golan, Soudry (2018), "Norm matters: efficient and accurate normalization schemes in deep
        networks", arXiv:1803.01814, section 4.1.
    """

    takes_mask = True
    own_scale: str | None = "the square of the mean absolute deviation, scaled, in running_var"

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize by the mean absolute deviation."""
        if mask is not None:
            x = torch.where(mask, x, 0)  # a NaN under the mask would reach the gradients
        moments = Moments.from_tensor(x, mask)
        deviation = (x.to(moments.mean.dtype) - per_channel(moments.mean, x)).abs()
        if mask is not None:
            deviation = torch.where(mask, deviation, 0)
        scale = math.sqrt(math.pi / 2) * deviation.sum(reduced_dims(x)) / moments.count.clamp(min=1)
        y = normalize(x, moments.mean, scale.square(), self.weight, self.bias, self.eps, residual, act)
        self.update_running(Moments(moments.count, moments.mean, scale.square() * moments.count))
        return y


class RangeBatchNorm(Variant):
    """Batch normalization by the range of the values, which tolerates low precision.

    Per channel, over the M = N·S values of the batch:

        scale = (max x − min x) / √(2·ln M),   y = act((x − mean) / √(scale² + eps) · weight + bias + residual)

    For Gaussian values the scale is one to two times the standard deviation, close to two for very large M. The output
    is smaller than with plain batch normalization; the weight can compensate for that.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As ``torch.nn.BatchNorm2d``.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        torch.nn's. ``running_var`` holds the square of the scale, so evaluation and folding, which use the buffers as
        mean and variance, are right. It depends on M: evaluation fits training only if M is similar in all batches.

    Differs:
        From ``torch.nn.BatchNorm*`` by the scale in training. A mask is refused.

    Numerics:
        The mean is summed in float64; maximum and minimum are exact. Several values at the extreme share its gradient.
        A constant channel gives 0, with gradients.

    Cost:
        Plain torch, with several passes over x: the layer is for its statistics, not for speed. Evaluation is fused.

    Raises:
        TypeError, ValueError: As :class:`keelnorm.BatchNorm`.

    Example:
        >>> RangeBatchNorm(1, eps=1e-12)(torch.tensor([[0.0], [2.0]])).flatten()
        tensor([-0.5887,  0.5887], grad_fn=<ViewBackward0>)

    Source:
        Banner, Hubara, Hoffer, Soudry (2018), "Scalable Methods for 8-bit Training of Neural Networks",
        arXiv:1805.11046, section 3.
    """

    own_scale: str | None = "the square of the range, scaled, in running_var"

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize by the range."""
        moments = Moments.from_tensor(x)
        count, dims = x.numel() // max(x.shape[1], 1), reduced_dims(x)
        if count > 1:
            extent = x.amax(dims).to(moments.mean.dtype) - x.amin(dims).to(moments.mean.dtype)
            var = extent.square() / (2 * math.log(count))
        else:
            var = torch.zeros_like(moments.mean)  # an empty batch has no extremes
        y = normalize(x, moments.mean, var, self.weight, self.bias, self.eps, residual, act)
        # running_var averages m2 / (count − 1), which is then the square of the scale.
        self.update_running(Moments(moments.count, moments.mean, var * (moments.count - 1)))
        return y
