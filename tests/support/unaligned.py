"""Tensors with misaligned values, such as views of a file's bytes."""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR = 64  # bytes of the widest


def unaligned(values: Tensor, offset: int = 1) -> Tensor:
    """A copy of dense values with the same strides, ``offset`` bytes from an address that is a multiple of 64."""
    memory = torch.empty(values.nbytes + VECTOR, dtype=torch.uint8)
    start = (offset - memory.data_ptr()) % VECTOR
    flat = torch.frombuffer(memory.numpy(), dtype=values.dtype, count=values.numel(), offset=start)
    view = flat.as_strided(values.shape, values.stride()).copy_(values)
    assert view.data_ptr() % VECTOR == offset
    return view.detach()  # no view of anything, as far as autograd knows
