"""Errors of all modules: a keyword that the constructor does not take, and torch.jit.script."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any, NoReturn, TypeVar

import torch

from keelnorm.functional import INSTEAD_OF_JIT

T = TypeVar("T")


class KeelnormModule(torch.nn.Module):
    """A module that refuses torch.jit.script, and whose constructor tells if a wrong keyword belongs to the call."""

    def __new__(cls: type[T], *args: Any, **keywords: Any) -> T:
        if keywords:
            _check(cls, keywords)
        return object.__new__(cls)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"keelnorm.{type(self).__name__} does not go through torch.jit.script, which can't express what it fuses. "
            f"{INSTEAD_OF_JIT}"
        )


def _check(kind: Any, keywords: dict[str, Any]) -> None:
    what, legal = kind.__name__, signature(kind.__init__).parameters
    if any(each.kind is Parameter.VAR_KEYWORD for each in legal.values()):
        return  # a constructor with **keywords checks them itself
    for name in keywords:
        if name in legal:
            continue
        if name in signature(kind.forward).parameters:
            raise TypeError(
                f"{what}: {name} belongs to the call, layer(x, {name}=...), and not to the constructor, so that tools "
                "that take the layer for an ordinary one are right"
            )
        raise TypeError(f"{what}: there is no {name} for this layer; it takes {', '.join(list(legal)[1:])}")
