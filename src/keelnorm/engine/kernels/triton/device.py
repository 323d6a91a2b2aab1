"""Checks of the operators' tensors, and facts about their device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from keelnorm.engine.kernels.triton import DTYPES
from keelnorm.engine.kernels.triton.tiling import View
from keelnorm.engine.layout import is_channels_last, require_memory
from keelnorm.engine.update_counts import COUNTS

IN_INTERPRETER = 4
"""Multiprocessors that are assumed for Triton's interpreter, so that reductions are split there too."""
MOST_ROWS = 2**31 - 2**16
"""Limit of the rows of the memory as a matrix, and of the values of a channel: kernels count them in 32 bits."""
_NOTHING = nullcontext()


def unsupported(argument: str) -> NotImplementedError:
    """The error for an argument whose dtype, layout or device the operators do not take; nothing has been written."""
    return NotImplementedError(f"keelnorm: unsupported: {argument}")


def _require_memory(name: str, t: Tensor) -> None:
    """Raise an error if t's storage was freed: reading it would make every later use of the GPU fail."""
    if not t.untyped_storage().nbytes():
        require_memory("keelnorm", **{name: t})


def view_of(x: Tensor, name: str = "x") -> View:
    """The view of x for the kernels; raises an error for a tensor that they do not take."""
    if x.dtype not in DTYPES or x.dim() < 2 or x.numel() == 0:
        raise unsupported("x")
    if not x.is_contiguous() and not is_channels_last(x):
        raise unsupported("x")
    _require_memory(name, x)
    view = View.of(x.shape, not x.is_contiguous())
    if view.rows >= MOST_ROWS or view.values >= MOST_ROWS:
        raise unsupported("x with so many samples or positions")
    return view


def laid_out_as(x: Tensor, name: str, t: Tensor) -> Tensor:
    """t, of x's shape, in x's layout: itself, or a copy."""
    if t.dtype not in DTYPES or t.shape != x.shape or t.device != x.device:
        raise unsupported(name)
    _require_memory(name, t)
    if t.is_contiguous() if x.is_contiguous() else is_channels_last(t):
        return t
    return torch.empty_strided(x.shape, x.stride(), dtype=t.dtype, device=t.device).copy_(t)


def check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise an error for vectors over the channels that the kernels can't read or write in place."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[1:2] or vector.device != x.device or not vector.is_contiguous():
            raise unsupported(name)
        _require_memory(name, vector)


def check_counts(x: Tensor, counts: Tensor | None) -> None:
    """Raise an error for counts of updates of a wrong shape or device; see `engine.update_counts`."""
    if counts is not None and (counts.shape != (3, x.shape[1]) or counts.device != x.device):
        raise unsupported(COUNTS)


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def processors(x: Tensor) -> int:
    """The number of multiprocessors of x's device."""
    return _multiprocessors(x.device.index) if x.is_cuda else IN_INTERPRETER


def launching(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device the current one, to which kernels go."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)
