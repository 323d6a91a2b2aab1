"""Rollback: a call that raises leaves tensors and modules as they were.

The native operators need none: they check everything before they write.
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

#: The buffers of batch norms.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Gradients:
    """What parameters have of gradients: ``requires_grad`` and ``grad`` of each."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]

    def restore(self) -> None:
        """Put them back."""
        for parameter, requires_grad, grad in self._before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


class Unchanged(AbstractContextManager[None]):
    """A context in which an exception restores tensors and modules to what they were on entry.

    Args:
        tensors: Tensors that may be written to; None is skipped.
        modules: Modules whose attributes may change, and in training their buffers. A deque among the attributes gets
            its contents back; other objects are taken to be replaced, not mutated.
        parameters: Parameters whose ``requires_grad`` and ``grad`` may change.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor | None] = (),
        modules: Iterable[nn.Module] = (),
        parameters: Iterable[nn.Parameter] = (),
    ) -> None:
        written = [tensor for tensor in tensors if tensor is not None]
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._deques: list[tuple[deque[Any], tuple[Any, ...]]] = []
        for module in modules:
            attributes, buffers = module.__dict__, module._buffers
            self._attributes += ((attributes, attributes.copy()), (buffers, buffers.copy()))
            counts = [value.tensor for value in attributes.values() if isinstance(value, UpdateCounts)]
            self._deques += [(value, tuple(value)) for value in attributes.values() if isinstance(value, deque)]
            if module.training:
                # Someone may have put a parameter in the place of a buffer.
                statistics = [value for name, value in module._parameters.items() if name in _STATISTICS]
                written += [tensor for tensor in (*buffers.values(), *counts, *statistics) if tensor is not None]
        written = [tensor for tensor in written if _has_values(tensor)]
        self._gradients = Gradients(parameters)
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
        self._gradients.restore()
        with torch.inference_mode(), _outside_of_transforms():
            for tensor, value in self._tensors:
                # What has not changed may be what can't be written to.
                if type(tensor) is not Tensor or not _is_same(tensor, value):
                    tensor.copy_(value)


def _has_values(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one; no layer writes to others."""
    strided = not (is_lazy(tensor) or tensor.is_nested) and tensor.layout is torch.strided
    return strided and not (tensor.is_meta or tensor.is_quantized or _is_freed(tensor))


def _is_freed(tensor: Tensor) -> bool:
    """Return whether the memory of a plain tensor is gone; using it raises an error later."""
    plain = type(tensor) in (Tensor, nn.Parameter) and transform_stack() is None
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN too. Versions do not tell: some operators do not count."""
    packed = (each.clone(memory_format=torch.contiguous_format).view(-1) for each in (tensor, other))
    return torch.equal(*(each.view(torch.uint8) for each in packed))


def _outside_of_transforms() -> AbstractContextManager[Any]:
    """Leave torch.func's transforms, inside which tensors from outside can't be written to."""
    return nullcontext() if transform_stack() is None else outside_of_transforms()


def unchanged(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which an exception restores a module and its children; compiled code has none."""
    return nullcontext() if torch.compiler.is_compiling() else Unchanged(modules=module.modules())
