"""A batch of sequences of equal or different lengths, in the order in which a recurrent layer processes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from keelnorm.engine.error_messages import describe


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences in decreasing length, step after step: the first ``sizes[t]`` of them have a step t.

    This is the form of ``torch.nn.utils.rnn.PackedSequence``, which has no padding.

    Attributes:
        data: The values of all steps one after another, (M, F) with M = Σ sizes.
        sizes: Number of sequences at each step, decreasing.
        batch: Number of sequences N; those without any step come last.
        order: Index that sorts the batch by decreasing length; None if it is sorted.
        inverse: Index that restores the order.
        rows: Index of each of the M rows in the padded batch (T·N, F); None if there is no padding.
        padded: T and N of the padded batch; None if the input was packed.
        packed: The packed input, or None.
    """

    data: Tensor
    sizes: list[int]
    batch: int
    order: Tensor | None = None
    inverse: Tensor | None = None
    rows: Tensor | None = None
    padded: tuple[int, int] | None = None
    packed: PackedSequence | None = field(default=None, repr=False)

    @classmethod
    def from_packed(cls, packed: PackedSequence) -> Sequences:
        """Make it from a packed sequence."""
        sizes = packed.batch_sizes.tolist()
        return cls(packed.data, sizes, sizes[0], packed.sorted_indices, packed.unsorted_indices, packed=packed)

    @classmethod
    def from_padded(cls, x: Tensor, valid: Tensor | None = None) -> Sequences:
        """Make it from x of shape (T, N, F), and a mask (T, N) of the steps that are there."""
        steps, batch = x.shape[:2]
        flat = x.reshape(steps * batch, *x.shape[2:])
        if valid is None:
            return cls(flat, [batch] * steps if batch else [], batch, padded=(steps, batch))
        lengths = valid.sum(0)
        order = lengths.argsort(descending=True, stable=True)
        there = torch.arange(steps, device=x.device).unsqueeze(1) < lengths[order]
        # For each sequence first the steps that are there, in their order.
        times = (~valid).to(torch.uint8).argsort(dim=0, stable=True)[:, order]
        rows = (times * batch + order)[there]
        sizes = [size for size in there.sum(1).tolist() if size]
        return cls(flat[rows], sizes, batch, order, order.argsort(), rows, (steps, batch))

    def backwards(self) -> Tensor:
        """The index (M,) that reverses each sequence within its own length; applied twice it is the identity."""
        count, batch = len(self.sizes), self.batch
        sizes = torch.tensor(self.sizes, dtype=torch.long)
        if not self.sizes or self.sizes[-1] == batch:  # all lengths are equal
            return torch.arange(count * batch, device=self.data.device).view(count, batch).flip(0).flatten()
        step, sample = torch.arange(count).unsqueeze(1), torch.arange(batch)
        lengths = (sizes.unsqueeze(1) > sample).sum(0)
        mirrored = (lengths - 1 - step).clamp(min=0)
        index = (sizes.cumsum(0) - sizes)[mirrored] + sample
        return index[step < lengths].to(self.data.device)

    def restore(self, data: Tensor) -> Tensor | PackedSequence:
        """Put values (M, H) into the form of the input: packed, or (T, N, H) with zeros for padding."""
        if self.packed is not None:
            given = self.packed
            return PackedSequence(data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
        assert self.padded is not None
        if self.rows is not None:
            steps, batch = self.padded
            data = data.new_zeros(steps * batch, data.shape[1]).index_copy(0, self.rows, data)
        return data.view(*self.padded, data.shape[1])

    def sort(self, state: Tensor) -> Tensor:
        """Put a state (…, N, H) into the sorted order."""
        return state if self.order is None else state.index_select(-2, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        """Put a state (…, N, H) into the order of the input."""
        return state if self.inverse is None else state.index_select(-2, self.inverse)


def valid_steps(
    what: str, x: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None, batch_first: bool
) -> Tensor | None:
    """The mask (T, N) of the steps of x (T, N, F) that are there, from ``mask`` or ``lengths``; None for all.

    Raises:
        TypeError, ValueError: ``mask`` or ``lengths`` doesn't fit, or both were given.
    """
    steps, batch = x.shape[:2]
    if mask is not None and lengths is not None:
        raise ValueError(f"{what}: mask and lengths say the same; give one of them")
    if mask is not None:
        shape = (batch, steps) if batch_first else (steps, batch)
        if (
            not isinstance(mask, Tensor)
            or mask.is_nested
            or mask.layout is not torch.strided
            or mask.dtype != torch.bool
            or mask.shape != shape
            or mask.device != x.device
        ):
            raise (ValueError if isinstance(mask, Tensor) and mask.dtype == torch.bool else TypeError)(
                f"{what}: a mask is boolean, True where a step counts, of shape {shape} (that of the input without its "
                f"features) on {x.device}; got {describe(mask)}"
            )
        return mask.t() if batch_first else mask
    if lengths is None:
        return None
    try:
        given = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what}: lengths are {batch} integers, one per sequence; got {describe(lengths)}") from None
    if given.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or given.shape != (batch,):
        raise ValueError(f"{what}: lengths are {batch} integers, one per sequence; got {describe(given)}")
    if batch and not 0 <= int(given.min()) <= int(given.max()) <= steps:
        raise ValueError(
            f"{what}: lengths lie between 0 and {steps}, the steps of the input; got {int(given.min())} to "
            f"{int(given.max())}"
        )
    return torch.arange(steps, device=x.device).unsqueeze(1) < given.to(x.device)
