"""How a tensor (N, C, *S) lies in memory, and how its channels are addressed."""

from __future__ import annotations

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels (dim 1) are the innermost, densely packed dimension: memory order N, *S, C."""
    return x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous or channels-last: the two layouts that kernels read without a copy."""
    return x.is_contiguous() or is_channels_last(x)


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions but that of the channels: those over which moments are taken."""
    return [dim for dim in range(x.dim()) if dim != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View C values so that they broadcast against ``x`` of shape (N, C, *S)."""
    return values.view(-1, *([1] * (x.dim() - 2)))
