"""What is kept for a saved tensor: the tensor itself, or a recipe by which the backward computes it again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: Computes an output again from x and the residual.
Make = Callable[[Tensor, Tensor | None], Tensor]


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, strides and offset."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


class Held:
    """A tensor that is kept for the backward, which must not be changed in place until then."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, which shares memory and version: an operation that saves its own output would keep itself alive.
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = None if tensor.is_inference() else tensor._version

    def get(self) -> Tensor:
        """Return the tensor, or raise autograd's error for one that was changed in place."""
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class Recipe:
    """How an output is computed again.

    Args:
        y: The output; only its layout is kept.
        make: Computes it from x and the residual.
        x, residual: What it was computed from.
        length: How many recipes follow one another, this one included.
    """

    __slots__ = ("_lock", "_taken", "_value", "dtype", "layout", "length", "make", "residual", "saved", "x")

    def __init__(self, y: Tensor, make: Make, x: Held | Recipe, residual: Held | Recipe | None, length: int) -> None:
        self.make, self.x, self.residual, self.length = make, x, residual, length
        self.layout, self.dtype = layout_of(y), y.dtype
        self.saved = self._taken = 0
        self._value: tuple[Held, Any] | None = None
        self._lock = threading.Lock()

    def get(self) -> Tensor:
        """Return the output, for one of those who saved it; the last one leaves nothing behind.

        A reader that changed it in place is found by its version. On a GPU it is shared within one stream alone.
        """
        with self._lock:
            held, stream = self._value or (None, None)
            here = torch.cuda.current_stream(self.x_device()) if self.x_device().type == "cuda" else None
            y = held.get() if held is not None and stream == here else self._compute()
            self._taken += 1
            last = self._taken >= self.saved
            self._value = None if last else (held if held is not None and stream == here else Held(y), here)
            self._taken = 0 if last else self._taken
        return y

    def x_device(self) -> torch.device:
        """Return the device of all that it is computed from."""
        return self.x.tensor.device if isinstance(self.x, Held) else self.x.x_device()

    def _compute(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            x = self.x.get()
            y = self.make(x.detach(), None if self.residual is None else self.residual.get().detach())
        if layout_of(y) != self.layout or y.dtype is not self.dtype:
            raise RuntimeError(
                f"save_memory: an output of shape {tuple(self.layout[0])} and strides {self.layout[1]} was computed "
                f"again with strides {y.stride()}; please report this, and leave the model out of save_memory"
            )
        return y


@dataclass(frozen=True)
class View:
    """A view of an output, as a flattened one."""

    recipe: Recipe
    layout: tuple[Any, ...]

    def get(self) -> Tensor:
        """Return the view of the recomputed output."""
        return self.recipe.get().as_strided(*self.layout)


#: What is kept for a saved tensor.
Packed: TypeAlias = Held | Recipe | View


def held_by(packed: Packed) -> Iterator[Tensor]:
    """Yield the tensors that are kept, in the place of a saved one."""
    if isinstance(packed, View):
        packed = packed.recipe
    if isinstance(packed, Held):
        yield packed.tensor
        return
    for source in (packed.x, packed.residual):
        if source is not None:
            yield from held_by(source)
