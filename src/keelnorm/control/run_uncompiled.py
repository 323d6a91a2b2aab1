"""Blocks that run compiled models uncompiled: a compiled graph ignores hooks set on a layer later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from keelnorm.engine.torch_internals import compiler

_lock = threading.Lock()
_blocks = 0
#: torch's context, open from the start of the first block to the end of the last one, in any order and thread.
_stance: Any = None


@contextmanager
def uncompiled(load: bool = False) -> Iterator[None]:
    """Run compiled code uncompiled inside the block, in the whole process; then restore the previous stance.

    Args:
        load: Keep code from being compiled inside the block too. Otherwise, if the compiler is not loaded yet, code may
            be compiled inside: it sees the present hooks, and is compiled again when they are gone.
    """
    global _blocks, _stance
    if not load and compiler() is None:  # nothing is compiled yet; loading the compiler takes seconds
        yield
        return
    with _lock:
        if _blocks == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _stance.__exit__(None, None, None)
