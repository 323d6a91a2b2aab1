"""Blocks inside which compiled code runs as it is written: a graph does not see what is set on a layer after it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_blocks = 0
#: torch's own context, open from the first block's begin to the last one's end, whatever their order and threads.
_stance: Any = None


@contextmanager
def uncompiled(load: bool = False) -> Iterator[None]:
    """Inside, what is compiled already runs uncompiled, in the whole process; afterwards in the stance of before.

    What is compiled inside sees the hooks that there are, and is compiled anew without them; with ``load`` it is not
    compiled either.
    """
    global _blocks, _stance
    if not load and "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading the compiler takes seconds
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
