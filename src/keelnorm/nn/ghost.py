"""Ghost batch normalization: small groups of a large batch are normalized separately."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.moments import Moments
from keelnorm.nn._shared.consecutive_groups import Groups, merge_rows, normalize_groups
from keelnorm.nn._shared.variant import Variant

#: How the groups of a batch enter the running statistics.
Update: TypeAlias = Literal["pooled", "sequential"]


class GhostBatchNorm(Variant):
    """Ghost batch normalization: in training each group of ``ghost_size`` consecutive samples is normalized by itself.

    Per channel and group B of the batch, with the group's mean and biased variance:

        y = act((x − mean_B) / √(var_B + eps) · weight + bias + residual),   x in B

    A large batch then has the noise of small ones, and their generalization. In evaluation the running statistics
    normalize, and there are no groups. "Four Things Everyone Should Know to Improve Batch Normalization" (Summers,
    Dinneen 2020, arXiv:1906.03548, section 3.2) uses the same groups.

    Args:
        num_features: Number of channels C.
        ghost_size: Samples per group, at least 1. From N on there is one group: batch normalization.
        eps: Added to the variance.
        momentum: Weight in the running statistics; None averages.
        affine: Whether there are a learnable weight and bias, which all groups share.
        track_running_stats: Whether there are running statistics.
        device, dtype: Of the parameters and buffers.
        update: How the running statistics are updated. ``"pooled"``: once, with the merged moments of all groups, as
            ``torch.nn`` updates them with the whole batch. ``"sequential"``: once per group, each with the weight
            ``momentum``, so that G groups leave (1 − momentum)^G of the old value; a batch counts as G batches, in
            ``num_batches_tracked`` too.

    Shape:
        (N, C, *S) -> (N, C, *S). If ``ghost_size`` does not divide N, the remaining samples are a group of their own;
        but a single sample without positions, which has one value per channel, joins the last group.

    State:
        As ``torch.nn.BatchNorm2d``'s, with the same keys.

    Differs:
        From ``torch.nn.BatchNorm*`` in training, by the groups. From the paper in ``update``: its algorithm 1 gives
        group i the weight momentum·(1 − momentum)^i, so the first group counts most and the weights do not sum to one.
        "sequential" is the exponential average that its text describes. "pooled" includes the variance between groups,
        which evaluation needs.

    Numerics:
        As :func:`keelnorm.functional.batch_norm`, per group. Moments are float64.

    Cost:
        As batch normalization of each group in turn, written into one tensor. Saved for the backward: as batch
        normalization, and the moments of the groups.

    Raises:
        TypeError, ValueError: The input can't be normalized, as with one value per channel and group; the running
            statistics are then as before.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
        >>> GhostBatchNorm(1, ghost_size=2)(x).flatten().round().tolist()
        [-1.0, 1.0, -1.0, 1.0]

    Source:
        Hoffer, Hubara, Soudry (2017), "Train longer, generalize better: closing the generalization gap in large batch
        training of neural networks", arXiv:1705.08741, algorithm 1.
    """

    ghost_size: int
    update: Update

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        update: Update = "pooled",
    ) -> None:
        if not is_count(ghost_size):
            raise ValueError(f"GhostBatchNorm: ghost_size must be an integer of at least 1; got {describe(ghost_size)}")
        if update not in get_args(Update):
            raise ValueError(f"GhostBatchNorm: update must be one of {get_args(Update)}; got {describe(update)}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.ghost_size, self.update = ghost_size, update

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize each group by itself."""
        sizes = self._sizes(x) if self.training else [x.shape[0]]
        state, pooled = self._state()._replace(update=self.counts()), self.update == "pooled"
        if len(sizes) == 1:
            return dispatch.batch_norm(x, residual, self.weight, self.bias, state, act)
        state = state._replace(update=state.update and state.sink is None)
        y, moments = normalize_groups(x, residual, self.weight, self.bias, Groups(sizes, pooled), state, act)
        if moments is None:
            return y
        if pooled:
            self.update_running(merge_rows(moments))
        else:
            for count, mean, m2 in zip(moments.count, moments.mean, moments.m2, strict=True):
                self.update_running(Moments(count.squeeze(), mean, m2))
        return y

    def _sizes(self, x: Tensor) -> list[int]:
        """Number of samples of each group."""
        samples, positions = x.shape[0], x[0, 0].numel() if x.shape[0] and x.shape[1] else 0
        if samples <= self.ghost_size:
            return [samples]
        if self.ghost_size * positions == 1:
            raise ValueError(
                f"GhostBatchNorm: one value per channel and group has no variance; got {describe(x)} and ghost_size=1. "
                "Take a larger ghost_size, or evaluate with model.eval()"
            )
        full, tail = divmod(samples, self.ghost_size)
        sizes = [self.ghost_size] * full
        if tail * positions == 1:
            sizes[-1] += tail
        elif tail:
            sizes.append(tail)
        return sizes

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}, update={self.update!r}"
