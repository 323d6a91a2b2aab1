"""Steps in torch's own operators, of which `save_memory` keeps neither the result nor the values between.

What a fused kernel computes is noted where it is called (`dispatch.note_output`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keelnorm.engine import saved_outputs
from keelnorm.engine.layout import counted
from keelnorm.engine.output_recipes import refuse_change
from keelnorm.engine.torch_internals import plain_apply, transforms_active

Function = Callable[..., Tensor]


def elementwise(function: Function, *tensors: Tensor | None) -> Tensor:
    """Return ``function(*tensors)``; where outputs are recomputed, autograd keeps the tensors alone.

    Args:
        function: Of torch's differentiable operators, value by value, in float32 or wider. It is called again in the
            backward.
        tensors: In the order in which the backward of torch's operators comes to them, the last operation's first: a
            tensor that is given twice has then a gradient with the same bits.
    """
    if torch.compiler.is_compiling() or not saved_outputs.calls or not _is_recomputed(tensors):
        return function(*tensors)
    return _apply(function, *tensors)  # type: ignore[no-any-return]


def joined(function: Function, outputs: Sequence[Tensor]) -> Tensor:
    """Return ``function(*outputs)``, one tensor with copies of the outputs' values."""
    y = function(*outputs)
    if not torch.compiler.is_compiling() and saved_outputs.calls:
        saved_outputs.note_after(y, function, tuple(outputs))
    return y


def padded(counts: Tensor, y: Tensor, padding: Tensor | None) -> Tensor:
    """Return y, and ``padding`` or 0 where ``counts`` is False."""
    result = counted(counts, y, padding)
    # With padding, x would have to be kept, beside the copy of x that the backward reads: as much as the result.
    if padding is None and not torch.compiler.is_compiling() and saved_outputs.calls:
        saved_outputs.note_after(result, lambda y, counts: counted(counts, y), (y,), (counts,))
    return result


def _is_recomputed(tensors: tuple[Tensor | None, ...]) -> bool:
    there = [t for t in tensors if t is not None]
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in there)
        and all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_inference() for t in there)
        and not transforms_active()
        and saved_outputs.are_recomputed()
    )


class _Vector(NamedTuple):
    """A tensor smaller than the result, with a copy: code may change it before the backward, as an optimizer does."""

    tensor: Tensor
    version: int
    copy: Tensor


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, *tensors: Tensor | None) -> Tensor:
        y = function(*tensors)
        vectors = [
            None if t is None or t.numel() >= y.numel() else _Vector(t, t._version, t.detach().clone()) for t in tensors
        ]
        ctx.save_for_backward(*(None if vector else t for t, vector in zip(tensors, vectors, strict=True)))
        ctx.function, ctx.vectors = function, vectors

        def make(*large: Tensor | None) -> Tensor:
            return function(*(vector.copy if vector else t for t, vector in zip(large, vectors, strict=True)))

        saved_outputs.note(y, make, *(None if vector else t for t, vector in zip(tensors, vectors, strict=True)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        needs = ctx.needs_input_grad[1:]
        tensors = [
            _value(vector, again) if vector else t for t, vector in zip(ctx.saved_tensors, ctx.vectors, strict=True)
        ]
        with torch.enable_grad():
            # Each argument by itself: one may depend on another, as a mean on x.
            given = [
                t if not need else t.view_as(t) if again else t.detach().requires_grad_()
                for t, need in zip(tensors, needs, strict=True)
            ]
            y = ctx.function(*given)
        asked = [t for t, need in zip(given, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=again, allow_unused=True))
        return None, *(next(found) if need else None for need in needs)


_apply = plain_apply(_Elementwise)


def _value(vector: _Vector, again: bool) -> Tensor:
    """Return the copy, or for a derivative that is differentiated the tensor in its place in the graph."""
    if not again or not vector.tensor.requires_grad:
        return vector.copy
    if vector.tensor._version != vector.version:
        refuse_change(vector.tensor, vector.version)
    return vector.tensor
