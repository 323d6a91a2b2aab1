"""Layers that say what is wrong with a keyword that their constructor does not take."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Constructed(torch.nn.Module):
    """A module whose constructor refuses, by name, what belongs to its calls or to another layer."""

    def __new__(cls: type[T], *args: Any, **keywords: Any) -> T:
        if keywords:
            _check(cls, keywords)
        return object.__new__(cls)


def _check(kind: Any, keywords: dict[str, Any]) -> None:
    what, legal = kind.__name__, signature(kind.__init__).parameters
    if any(each.kind is Parameter.VAR_KEYWORD for each in legal.values()):
        return  # whoever takes everything knows what to do with it
    for name in keywords:
        if name in legal:
            continue
        if name in signature(kind.forward).parameters:
            raise TypeError(
                f"{what}: {name} belongs to the call, layer(x, {name}=...), and not to the constructor, so that tools "
                "that take the layer for an ordinary one are right"
            )
        raise TypeError(f"{what}: there is no {name} for this layer; it takes {', '.join(list(legal)[1:])}")
