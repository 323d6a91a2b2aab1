"""How a tensor (N, C, *S) lies in memory, and how its channels are addressed."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels (dim 1) are the innermost, densely packed dimension: memory order N, *S, C."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is not None:
        return x.is_contiguous(memory_format=memory_format)
    return x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous or channels-last: the two layouts that kernels read without a copy."""
    return x.is_contiguous() or is_channels_last(x)


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is dense, else a copy in the nearer of the two layouts; differentiable.

    The nearer one is channels-last where no dimension has a smaller stride than the channels, else contiguous.
    """
    if is_dense(x):
        return x
    if not _is_nearer_to_channels_last(x):
        return x.contiguous()
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is not None:
        return x.contiguous(memory_format=memory_format)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _is_nearer_to_channels_last(x: Tensor) -> bool:
    if x.dim() == 2 or x.shape[1] == 1 or x.stride(1) == 0:
        return False
    return all(x.stride(1) < x.stride(d) for d in range(x.dim()) if d != 1 and x.shape[d] > 1)


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions but that of the channels: those over which moments are taken."""
    return [dim for dim in range(x.dim()) if dim != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View C values so that they broadcast against ``x`` of shape (N, C, *S)."""
    return values.view(-1, *([1] * (x.dim() - 2)))


def counted(counts: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
    """``values`` where ``counts`` is True, elsewhere ``padding`` or 0; differentiable, and laid out as ``values``."""
    return torch.where(counts, values, 0 if padding is None else padding)  # masked_fill's result is contiguous
