"""Words for error messages: what came, in a form that a reader can act on."""

from __future__ import annotations

from typing import Any

import torch


def describe(value: Any) -> str:
    """Say what ``value`` is: a tensor's dtype, shape and device, or another object's type and value.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a float32 tensor of shape (2, 3) on cpu'
        >>> describe("x")
        "'x' (str)"
    """
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        article = "an" if dtype[0] in "aeiou" else "a"
        return f"{article} {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if value is None:
        return "None"
    return f"{value!r} ({type(value).__name__})"
