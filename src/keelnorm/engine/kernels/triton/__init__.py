"""The GPU back end: Triton kernels for CUDA and ROCm, loaded at the first call with a tensor on a GPU.

With TRITON_INTERPRET=1 in the environment the same kernels run in Triton's interpreter, slowly, and on CPU tensors too;
so they are tested on machines without a GPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import torch

DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
"""The dtypes of the operators; float64 is slow on most GPUs."""

_operators: ModuleType | None = None


def interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why the kernels are not available on any device, or None."""
    return None if find_spec("triton") is not None else "Triton is not installed"


def unusable() -> str | None:
    """Why the kernels don't run on this machine, or None."""
    lacking = missing()
    if lacking is None and not interpreted() and not torch.cuda.is_available():
        lacking = "torch finds no GPU here"
    return lacking


def load() -> ModuleType | None:
    """The module of the operators, or None where Triton is missing. Called for every tensor on a GPU."""
    global _operators
    if _operators is None and missing() is None:
        from keelnorm.engine.kernels.triton import operators as module

        _operators = module
    return _operators


def calls() -> int:
    """How many operators have run in this process."""
    return 0 if _operators is None else int(_operators.calls)
