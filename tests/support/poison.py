"""Fills fresh memory with NaN, so that values that were never written show.

torch's CPU allocator can fill every block it hands out with the bytes ef be ed 7f. It is a switch of libc10 itself, so
it covers all that is allocated through torch: ``torch.empty``, ``empty_like`` and ``new_empty``, the results of torch's
own operators, and those of the native library, which come from ``aoti_torch_empty_strided``.
``torch.utils.deterministic.fill_uninitialized_memory`` covers the first three only.

    float32             NaN
    float64             1.67e308, too large to pass for a result
    float16, bfloat16   a number and NaN in turn
    int64, bool         a large number, True

Not covered: memory that does not come from this allocator, such as the scratch arrays of the native library (stack and
``new``) and what NumPy allocates.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

#: What a fresh float64 holds.
FRESH_DOUBLE = torch.tensor([0x7FEDBEEF7FEDBEEF]).view(torch.float64).item()


def poison_fresh_memory() -> None:
    """Make fresh tensors of this process hold NaN, or a value that takes its place in other dtypes."""
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill").value = True
