"""Find and change the tensors in nested arguments and results of a model."""

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

from keelnorm.engine.error_messages import RefusedTypeError, describe

#: Types that hold no tensors to be found.
_LEAVES = (str, bytes, int, float, complex, type, Module, torch.Size, types.FunctionType, types.ModuleType)


def tensors_in(root: Any) -> list[Tensor]:
    """All tensors in containers, data classes and attributes of objects, in order; modules are skipped.

    A tensor is listed as often as it occurs.
    """
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


def main_output(output: Any) -> Tensor | None:
    """The tensor that stands for a model's output: itself, its ``logits``, or the first floating-point one in it."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor | tuple | list | Mapping):
        output = getattr(output, "logits", output)
    found = (t for t in tensors_in(output) if t.is_floating_point() and t.ndim > 0 and t.numel())
    return next(found, None)


def map_tensors(change: Callable[[Tensor], Any], root: Any) -> Any:
    """Copy a value with each tensor in its tuples, lists and mappings changed; other objects are not copied."""
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
    """The positional arguments and the keywords with which an example calls the model.

    Args:
        what: The public function that was called, for errors.
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
    raise RefusedTypeError(
        f"{what}: example must be a tensor (the model's only argument), a tuple of its arguments, or a mapping of its "
        f"keywords; got {describe(example)}. A list that is itself the argument goes into a tuple: (example,)"
    )
