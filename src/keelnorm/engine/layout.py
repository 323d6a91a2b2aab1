"""How a tensor (N, C, *S) lies in memory, and how its channels are addressed."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def check_kind(what: str, name: str, value: Tensor) -> None:
    """Raise a TypeError unless a tensor is of the ordinary kind: a number for each place of a shape, or on meta."""
    if value.is_nested:
        remedy = "Pad it, as with .to_padded_tensor(0.0), and say by mask= which values count"
    elif value.is_quantized:
        remedy = "Convert it first, with .dequantize()"
    elif value.layout is not torch.strided:
        remedy = "Convert it first, with .to_dense()"
    else:
        return
    raise TypeError(f"{what}: {name} must be an ordinary dense tensor; got {describe(value)}. {remedy}")


def require_memory(what: str, **tensors: Tensor | None) -> None:
    """Raise where the values of a plain tensor lie outside of its storage, which was freed or cut short.

    The native operators look for themselves; torch's own, and a GPU's kernels, would read what is not there.

    Args:
        what: What was called, the first words of the message.
    """
    if torch.compiler.is_compiling():
        return
    for name, t in tensors.items():
        if t is None or type(t) not in (Tensor, torch.nn.Parameter):
            continue
        try:
            held = t.untyped_storage().nbytes()
        except NotImplementedError:  # of torch.func, or of another kind than strides
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
    """Whether ``x`` is contiguous or channels-last: the two layouts that kernels read without a copy."""
    return x.is_contiguous() or is_channels_last(x)


def dense(x: Tensor) -> Tensor:
    """``x`` in the memory format in which torch's batch norms give their result: itself, or a copy; differentiable.

    Under torch.func.vmap always itself: how it lies is not seen there.
    """
    if x.is_contiguous() or _is_batched(x):
        return x
    form = memory_format(x)
    if not x.is_contiguous(memory_format=form):
        require_memory("keelnorm", x=x)
    return x.contiguous(memory_format=form)


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last for x of four or five dimensions whose strides rise in that order, else contiguous.

    x may have gaps, as a slice has, but not values that share memory. This is torch's own rule (c10/core/
    MemoryFormat.h), save that a dimension of one value has no say.
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


def _is_batched(x: Tensor) -> bool:
    """Whether torch.func.vmap has a dimension of x that is not seen here."""
    if torch.compiler.is_compiling():  # which can't look closer
        return torch._C._are_functorch_transforms_active()
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions but that of the channels: those over which moments are taken."""
    return [dim for dim in range(x.dim()) if dim != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View C values so that they broadcast against ``x`` of shape (N, C, *S)."""
    return values.view(-1, *([1] * (x.dim() - 2)))


def counted(counts: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
    """``values`` where ``counts`` is True, elsewhere ``padding`` or 0; differentiable, and laid out as ``values``."""
    return torch.where(counts, values, 0 if padding is None else padding)  # masked_fill's result is contiguous
