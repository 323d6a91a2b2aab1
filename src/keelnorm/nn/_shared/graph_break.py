"""A call that torch.compile does not trace. Imported late: torch.compiler.disable loads the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="a synchronized batch normalization talks to other ranks in its forward and in its backward, in an order "
    "that is the same on all of them, which a compiled graph would not keep"
)
def call_uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function(*args, **kwargs)`` outside of any graph."""
    return function(*args, **kwargs)
