"""A call that raises leaves everything as it was: what it had written is put back.

The native operators do without: they check everything before they write anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from keelnorm.engine.torch_internals import outside_of_transforms, transform_stack
from keelnorm.engine.update_counts import UpdateCounts


class Unchanged(AbstractContextManager[None]):
    """Inside of ``with``, an exception puts tensors and modules back to what they were at the beginning.

    Args:
        tensors: What may be written to; None is nothing.
        modules: Whose attributes may change, and, in training, whose buffers. A deque among the attributes gets back
            what it held; other objects are taken to be replaced, not changed.
    """

    def __init__(self, tensors: Iterable[Tensor | None] = (), modules: Iterable[nn.Module] = ()) -> None:
        written = [tensor for tensor in tensors if tensor is not None]
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._deques: list[tuple[deque[Any], tuple[Any, ...]]] = []
        for module in modules:
            attributes, buffers = module.__dict__, module._buffers
            self._attributes += ((attributes, attributes.copy()), (buffers, buffers.copy()))
            counts = [value.tensor for value in attributes.values() if isinstance(value, UpdateCounts)]
            self._deques += [(value, tuple(value)) for value in attributes.values() if isinstance(value, deque)]
            if module.training:
                written += [tensor for tensor in (*buffers.values(), *counts) if tensor is not None]
        written = [tensor for tensor in written if _has_values(tensor)]
        self._tensors = [(t, t.detach().clone() if t.requires_grad else t.clone()) for t in written]

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return
        for attributes, before in self._attributes:
            attributes.update(before)
            for name in attributes.keys() - before.keys():
                del attributes[name]
        for values, held in self._deques:
            values.clear()
            values.extend(held)
        with torch.inference_mode(), _outside_of_transforms():
            for tensor, value in self._tensors:
                # What has not changed may be what can't be written to.
                if type(tensor) is not Tensor or not _is_same(tensor, value):
                    tensor.copy_(value)


def _has_values(tensor: Tensor) -> bool:
    """Whether it is of an ordinary kind; no layer writes to others."""
    strided = not (is_lazy(tensor) or tensor.is_nested) and tensor.layout is torch.strided
    return strided and not (tensor.is_meta or tensor.is_quantized or _is_freed(tensor))


def _is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a plain tensor is gone, which whoever uses it will say."""
    plain = type(tensor) in (Tensor, nn.Parameter) and transform_stack() is None
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit for bit: NaN too. (Not every operator of torch's counts what it writes.)"""
    packed = (each.clone(memory_format=torch.contiguous_format).view(-1) for each in (tensor, other))
    return torch.equal(*(each.view(torch.uint8) for each in packed))


def _outside_of_transforms() -> AbstractContextManager[Any]:
    """Under torch.func nothing may be written to that lies outside; what is put back is none of its affair."""
    return nullcontext() if transform_stack() is None else outside_of_transforms()


def unchanged(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, an exception leaves a module and all in it as they were; what is compiled goes without."""
    return nullcontext() if torch.compiler.is_compiling() else Unchanged(modules=module.modules())
