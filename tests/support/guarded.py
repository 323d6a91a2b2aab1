"""Tensors between guarded memory: views into larger buffers, and memory between pages that fault."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from .cases import laid_out


class Guarded:
    """A copy of a tensor at ``offset`` floats from an aligned address, surrounded by values that must not change."""

    MARGIN = 32
    SENTINEL = -123456.0

    def __init__(self, values: Tensor, layout: str, offset: int) -> None:
        values = laid_out(values, layout)
        self._buffer = torch.full((values.numel() + 2 * self.MARGIN,), self.SENTINEL)
        start = self.MARGIN + offset
        self._inside = slice(start, start + values.numel())
        self.tensor = self._buffer[self._inside].as_strided(values.shape, values.stride(), start).copy_(values)

    def neighbours_unchanged(self) -> bool:
        outside = torch.cat([self._buffer[: self._inside.start], self._buffer[self._inside.stop :]])
        return bool((outside == self.SENTINEL).all())


def between_guard_pages(values: Tensor, layout: str, *, at_end: bool) -> Tensor:
    """A copy that begins right after, or ends right before, a page whose access ends the process. Never freed."""
    values = laid_out(values, layout)
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    private_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, (pages + 2) * mmap.PAGESIZE, 0, private_anonymous, -1, 0)  # no access
    first = start + mmap.PAGESIZE
    if libc.mprotect(first, pages * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    address = first + pages * mmap.PAGESIZE - size if at_end else first
    memory = (ctypes.c_char * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided(values.shape, values.stride()).copy_(values)
