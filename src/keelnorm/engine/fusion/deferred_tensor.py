"""The tensor that a batch norm returns while its result waits for the next operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keelnorm.engine.fusion.operations import METADATA, read
from keelnorm.engine.torch_internals import (
    graph_break,
    run_uncompiled,
    swap_tensors,
    throw_on_mutable_data_pointer,
    tree_map,
    without_torch_function,
)

if TYPE_CHECKING:
    from keelnorm.engine.fusion.pending import Pending


class DeferredTensor(Tensor):
    """A result that is computed once its use is known.

    It behaves as the tensor that it stands for. The first operation on it either runs as one kernel with the batch
    norm, or turns the object itself into a plain ``torch.Tensor`` (:func:`settle`), for every reference to it. Code
    that looks at the type before, ``type(y) is torch.Tensor``, sees this class.

    Code that bypasses ``__torch_function__`` (C++, ``autograd.Function.apply``) reaches ``__torch_dispatch__`` and gets
    the values there; the gradients go through the tensor's own autograd node. There is no memory to read.
    """

    _pending: Pending = None  # type: ignore[assignment]  # each instance has its own

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # a function that is compiled, within a model that is not
            graph_break()
        return _answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return with_values(func, args, kwargs or {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make ``type(y)(...)`` a plain tensor."""
        return Tensor(*args, **kwargs)


run_uncompiled(DeferredTensor.__torch_function__.__func__.__code__)  # type: ignore[attr-defined]


def _answer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if func in METADATA:
        with without_torch_function():
            return func(*args, **kwargs)
    operation = read(func, args, kwargs)
    if operation is not None and type(operation.target) is DeferredTensor:
        result = operation.target._pending.follow(operation, func, args, kwargs)
        if result is not None:
            return result
    waiting = list(deferred_in((args, kwargs)))
    if not waiting:  # inside an object that only the function can open
        with without_torch_function():
            return func(*args, **kwargs)
    reason = f"{getattr(func, '__name__', func)} reads its result"
    for tensor in waiting:
        if type(tensor) is DeferredTensor and not tensor._pending.stays(reason):  # it may be there twice
            settle(tensor, reason)
    return with_values(func, args, kwargs)


def with_values(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function on the values of deferred tensors, which stay deferred."""
    stand_ins: dict[int, Tensor] = {}

    def values_of(value: Any) -> Any:
        if type(value) is not DeferredTensor:
            return value
        values = value._pending.expose()
        stand_ins[id(values)] = value
        return values

    if next(deferred_in((args, kwargs)), None) is None:
        return function(*args, **kwargs)
    result = function(*tree_map(values_of, args), **tree_map(values_of, dict(kwargs)))
    # What an operation in place returns is the tensor that it was given.
    return tree_map(lambda value: stand_ins.get(id(value), value), result)


def deferred_in(value: Any) -> Iterator[DeferredTensor]:
    """Yield the deferred tensors in nested containers."""
    if type(value) is DeferredTensor:
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from deferred_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from deferred_in(item)


def settle(tensor: Tensor, reason: str, learn: bool = True) -> None:
    """Turn a deferred tensor into the plain one that it stands for, for every reference to it.

    Args:
        tensor: Any tensor; a plain one stays.
        reason: Why, in words for a report.
        learn: Whether the layer expects this from now on.
    """
    if type(tensor) is DeferredTensor:
        tensor._pending.settle(tensor, reason, learn)


def defer(tensor: Tensor, pending: Pending) -> Tensor:
    """Turn a tensor itself into a deferred one."""
    tensor.__class__ = DeferredTensor
    tensor._pending = pending  # type: ignore[attr-defined]
    return tensor


def become_plain(tensor: Tensor) -> None:
    """Turn a deferred tensor that has values into a plain one."""
    tensor.__class__ = Tensor
    del tensor.__dict__["_pending"]


def become(tensor: Tensor, value: Tensor) -> None:
    """Turn a deferred tensor into ``value``, plain or deferred, with its place in the graph; ``value`` is used up."""
    pending, kind = tensor.__dict__.pop("_pending"), type(value)
    following = value.__dict__.pop("_pending", None)
    tensor.__class__ = value.__class__ = Tensor
    swap_tensors(tensor, value)
    if following is not None:
        tensor.__class__ = kind
        tensor._pending = following  # type: ignore[attr-defined]
    if value._use_count() > 1:  # type: ignore[attr-defined]  # C++ still holds the promise, as an argument of autograd.Function.apply
        defer(value, pending)


def without_memory(like: Tensor) -> DeferredTensor:
    """Return a deferred tensor of the same shape, strides, dtype and device, without memory."""
    tensor = Tensor._make_wrapper_subclass(
        DeferredTensor, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
    )
    throw_on_mutable_data_pointer(tensor)
    return tensor
