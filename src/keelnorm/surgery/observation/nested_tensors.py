"""Tensors in whatever a model takes and returns: containers, data classes, any object with attributes."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from keelnorm.engine.error_messages import describe

#: Not looked into.
_LEAVES = (str, bytes, int, float, complex, type, Module, torch.Size, types.FunctionType, types.ModuleType)


def tensors_in(root: Any) -> list[Tensor]:
    """All tensors in a value, in order, each as often as it occurs; modules are not looked into."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, _LEAVES) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(reversed(_parts(value)))
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return list(getattr(value, "__dict__", {}).values())


def map_tensors(change: Callable[[Tensor], Any], root: Any) -> Any:
    """A copy of the value with each tensor in its tuples, lists and mappings changed; other objects are the same."""
    if isinstance(root, Tensor):
        return change(root)
    if isinstance(root, MutableMapping):
        new = copy.copy(root)
        for name, value in root.items():
            new[name] = map_tensors(change, value)
        return new
    if isinstance(root, tuple) and hasattr(root, "_fields"):
        return type(root)(*(map_tensors(change, value) for value in root))
    if isinstance(root, list | tuple):
        return type(root)(map_tensors(change, value) for value in root)
    return root


def call_of(what: str, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords of the model's call that an example stands for.

    Args:
        what: What was called, the first words of an error.
        example: A tensor, the only argument; a tuple of arguments; or a mapping of keywords.

    Raises:
        TypeError: It is none of these.

    Example:
        >>> args, keywords = call_of("fold", {"pixel_values": torch.zeros(1)})
        >>> args, list(keywords)
        ((), ['pixel_values'])
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping) and all(isinstance(name, str) for name in example):
        return (), dict(example)
    raise TypeError(
        f"{what}: example must be a tensor (the model's only argument), a tuple of its arguments, or a mapping of its "
        f"keywords; got {describe(example)}. A list that is itself the argument goes into a tuple: (example,)"
    )
