"""What is kept for a saved tensor: the tensor itself, or a recipe by which the backward computes it again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from keelnorm.engine.layout import require_memory
from keelnorm.engine.torch_internals import at_end_of_backward, running_backward

#: Computes an output again from what it was computed from.
Make = Callable[..., Tensor]


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, strides and offset."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


class Held:
    """A tensor that is kept for the backward, which must not be changed in place until then."""

    __slots__ = ("_tensor", "instead", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, which shares memory and version: an operation that saves its own output would keep itself alive.
        self._tensor: Tensor | None = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = None if tensor.is_inference() else tensor._version
        self.instead: Recipe | View | None = None

    @property
    def tensor(self) -> Tensor:
        """The tensor that is kept."""
        assert self._tensor is not None
        return self._tensor

    def get(self) -> Tensor:
        """Return the tensor, or raise autograd's error for one that was changed in place."""
        if self.instead is not None:
            return self.instead.get()
        if self.version is not None and self.tensor._version != self.version:
            refuse_change(self.tensor, self.version)
        return self.tensor

    def replace(self, instead: Recipe | View) -> None:
        """Keep a recipe in the tensor's place, which became known after the tensor was saved."""
        self.instead, self._tensor = instead, None


def refuse_change(tensor: Tensor, version: int) -> NoReturn:
    """Raise autograd's error for a tensor that was changed in place."""
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
        f"shape {tuple(tensor.shape)} is at version {tensor._version}; expected version {version} instead"
    )


class Value(NamedTuple):
    """A recomputed output, shared by its readers within one backward.

    Args:
        held: The output. A reader that changed it in place is found by its version.
        task: The backward.
        stream: On a GPU it is shared within one stream alone.
        taken: How many readers have had it.
    """

    held: Held
    task: int
    stream: Any
    taken: int


class Recipe:
    """How an output is computed again.

    Args:
        y: The output; only its layout is kept.
        make: Computes it from the sources.
        sources: What it was computed from.
        length: How many batch norms follow one another in it.
    """

    __slots__ = ("__weakref__", "_lock", "_value", "device", "dtype", "layout", "length", "make", "saved", "sources")

    def __init__(self, y: Tensor, make: Make, sources: tuple[Packed | None, ...], length: int) -> None:
        self.make, self.sources, self.length = make, sources, length
        self.layout, self.dtype, self.device = layout_of(y), y.dtype, y.device
        self.saved = 0
        self._value: Value | None = None
        self._lock = threading.Lock()

    def save(self) -> None:
        """Count one more who will ask for the output in a backward."""
        self.saved += 1
        if self.saved == 1:  # it is computed once for all of them
            for source in self.sources:
                recipe = recipe_of(source)
                if recipe is not None:
                    recipe.save()

    def get(self) -> Tensor:
        """Return the output, for one of those who saved it; the last one leaves nothing behind.

        Nor does the end of the backward, if not all of them take part in it.
        """
        task = running_backward()
        with self._lock:
            value, stream = self._value, self._stream()
            same = value is not None and value.task == task
            if value is not None and same and value.stream == stream:
                held, y = value.held, value.held.get()
            else:
                y = self._compute()
                held = Held(y)
            taken = 1 + (value.taken if value is not None and same else 0)
            shared = task != -1 and taken < self.saved
            if shared and not same:
                at_end_of_backward(partial(_release, ref(self), task))
            self._value = Value(held, task, stream, taken) if shared else None
        return y

    def release(self, task: int) -> None:
        """Forget what was computed in a backward, at its end."""
        with self._lock:
            if self._value is not None and self._value.task == task:
                self._value = None

    def _stream(self) -> Any:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _compute(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            given = [None if source is None else source.get().detach() for source in self.sources]
            require_memory("save_memory", **{f"what an output is computed from ({i})": t for i, t in enumerate(given)})
            y = self.make(*given)
        if layout_of(y) != self.layout or y.dtype is not self.dtype:
            raise RuntimeError(
                f"save_memory: an output of shape {tuple(self.layout[0])} and strides {self.layout[1]} was computed "
                f"again with strides {y.stride()}; please report this, and leave the model out of save_memory"
            )
        return y


def _release(recipe: ref[Recipe], task: int) -> None:
    there = recipe()  # the callback must not keep x until the end of the backward
    if there is not None:
        there.release(task)


@dataclass(frozen=True)
class View:
    """A view of an output, as a flattened one."""

    recipe: Recipe
    layout: tuple[Any, ...]

    def get(self) -> Tensor:
        """Return the view of the recomputed output."""
        return self.recipe.get().as_strided(*self.layout)


#: What is kept for a saved tensor, and for what an output is computed from.
Packed: TypeAlias = Held | Recipe | View


def recipe_of(packed: Packed | None) -> Recipe | None:
    """Return the recipe, also of a view; None for a tensor that is held."""
    recipe = packed.recipe if isinstance(packed, View) else packed
    return recipe if isinstance(recipe, Recipe) else None


def held_by(packed: Packed) -> Iterator[Tensor]:
    """Yield the tensors that are kept, in the place of a saved one."""
    if isinstance(packed, Held):
        if packed.instead is None:
            yield packed.tensor
            return
        packed = packed.instead
    recipe = packed.recipe if isinstance(packed, View) else packed
    for source in recipe.sources:
        if source is not None:
            yield from held_by(source)
