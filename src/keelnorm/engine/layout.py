"""Memory layouts of a tensor (N, C, *S), and views of its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import is_batched_by_vmap

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def check_kind(what: str, name: str, value: Tensor) -> None:
    """Raise a TypeError unless a tensor is strided: not nested, quantized or sparse."""
    if value.is_nested:
        remedy = "Pad it, as with .to_padded_tensor(0.0), and give the values that count by mask="
    elif value.is_quantized:
        remedy = "Convert it first, with .dequantize()"
    elif value.layout is not torch.strided:
        remedy = "Convert it first, with .to_dense()"
    else:
        return
    raise TypeError(f"{what}: {name} must be an ordinary dense tensor; got {describe(value)}. {remedy}")


def require_memory(what: str, **tensors: Tensor | None) -> None:
    """Raise a RuntimeError where the storage of a tensor was freed or shrunk, so that its values lie outside of it.

    The native operators check this themselves; torch's operators and a GPU's kernels would read invalid memory.

    Args:
        what: The function or layer that was called, which begins the message.
        tensors: The tensors by their argument names.
    """
    if torch.compiler.is_compiling():
        return
    for name, t in tensors.items():
        if t is None or type(t) not in (Tensor, torch.nn.Parameter):
            continue
        try:
            held = t.untyped_storage().nbytes()
        except NotImplementedError:  # a tensor of torch.func, or not strided
            continue
        span = t.numel()
        if span and not t.is_contiguous():
            span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        needed = (t.storage_offset() + span) * t.itemsize
        if span and held < needed:
            raise RuntimeError(
                f"{what}: the memory of {name} is gone: its values take {needed} bytes of a storage that holds {held}. "
                "It was freed or cut short, as sharded training does with parameters between their uses: gather them "
                "first, or leave the storage of tensors that are still in use as it is"
            )


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels (dim 1) are the innermost, densely packed dimension: memory order N, *S, C."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is not None:
        return x.is_contiguous(memory_format=memory_format)
    return x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous or channels-last, the layouts that kernels read without a copy."""
    return x.is_contiguous() or is_channels_last(x)


def dense(x: Tensor) -> Tensor:
    """``x`` in the memory format of the result of torch's batch norms: itself, or a copy; differentiable.

    Under torch.func.vmap always itself, because the memory format is not visible there.
    """
    if x.is_contiguous() or is_batched_by_vmap(x):
        return x
    form = memory_format(x)
    if not x.is_contiguous(memory_format=form):
        require_memory("keelnorm", x=x)
    return x.contiguous(memory_format=form)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of x: channels-last for four or five dimensions with strides in that order, else contiguous.

    x may have gaps, as a slice has, but no overlapping values. This is torch's own rule (c10/core/MemoryFormat.h),
    except that dimensions of size 1 are ignored.
    """
    last = _CHANNELS_LAST.get(x.dim())
    if last is None or x.shape[1] == 1:
        return torch.contiguous_format
    least = 1
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[dim] != 1:
            if x.stride(dim) < least:
                return torch.contiguous_format
            least = x.stride(dim) * x.shape[dim]
    return last


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions except the channels: those that moments are taken over."""
    return [dim for dim in range(x.dim()) if dim != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View C values so that they broadcast with ``x`` of shape (N, C, *S)."""
    return values.view(-1, *([1] * (x.dim() - 2)))


def counted(counts: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
    """``values`` where ``counts`` is True, elsewhere ``padding`` or 0; differentiable, in the layout of ``values``."""
    return torch.where(counts, values, 0 if padding is None else padding)  # masked_fill's result is contiguous


def pad_(counts: Tensor, values: Tensor, padding: Tensor | None) -> None:
    """Write ``padding`` or 0 to ``values`` where ``counts`` is False: :func:`counted` in place."""
    if padding is None:
        values.masked_fill_(~counts, 0)
    else:
        torch.where(counts, values, padding, out=values)
