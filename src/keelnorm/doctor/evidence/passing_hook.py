"""Hooks that are the doctor's own affair: copies and pickles of the model do not have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class PassingHook:
    """Calls a function; in a copy or pickle of the module that it is set on it does nothing.

    It does nothing in code that is being compiled either: what it looks at would become part of the graph.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._function = call

    def __call__(self, *args: Any) -> None:
        """Pass the arguments on."""
        if self._function is not None and not torch.compiler.is_compiling():
            self._function(*args)

    def __reduce__(self) -> tuple[type[PassingHook], tuple[()]]:
        return PassingHook, ()
