"""Outputs of batch norms that are recomputed in the backward instead of being kept for it.

Autograd keeps y = act(bn(x) + residual) for whatever reads it: the next convolution, a pooling, ReLU's own gradient.
The batch norm's gradient needs x, which is kept anyway, and y is a cheap function of x. So while a model runs, hooks on
saved tensors keep a :class:`Recipe` instead of y, and the backward computes y again, bit for bit.

An output is recognized by its storage and its version. A weak reference keeps the storage's address from being given to
another one, and a tensor that was changed in place is kept as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from sys import _getframe
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from keelnorm.engine.recomputation import is_running
from keelnorm.engine.torch_internals import saved_tensor_hooks, transforms_active

#: The longest chain that may be asked for: a backward recurses so deep.
LONGEST = 64
#: Computes an output again from x and the residual.
Make = Callable[[Tensor, Tensor | None], Tensor]

#: How many calls of models, in all threads, recompute outputs now. Read before anything else, so that it costs nothing.
calls = 0
_lock = threading.Lock()


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


class Frame:
    """One call of a model, in which outputs are recognized.

    Args:
        module: The model.
        frame: The call's frame; hooks that a call left behind, as KeyboardInterrupt does, keep tensors as they are.
        longest: The longest chain of recipes; 0 keeps every output.
        record: Called with the tensor and what is kept for it, each time one is saved.
    """

    def __init__(
        self, module: nn.Module, frame: FrameType, longest: int, record: Callable[[Tensor, Packed], None] | None = None
    ) -> None:
        self.module, self.longest, self.record = module, longest, record
        self._frame: FrameType | None = frame
        self._known: dict[int, tuple[StorageWeakRef, int, Recipe]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()  # raises where hooks are disabled

    def runs(self) -> bool:
        """Return whether the call still runs: KeyboardInterrupt ends it unseen by hooks."""
        return self._frame is not None and is_running(self._frame)

    def is_of(self, caller: FrameType) -> bool:
        """Return whether torch calls a hook of this very call: after an exception it does so from the frame outside."""
        return self._frame is not None and caller in (self._frame, self._frame.f_back)

    def close(self) -> None:
        """End the call: forget its outputs. What was kept for the backward stays."""
        self._frame, self._known = None, {}

    def remove_hooks(self) -> bool:
        """Remove the hooks, unless others were put on top of them; return whether they are gone."""
        top = saved_tensor_hooks(True)
        if top is None or top[0] != self._pack:
            return False
        self._hooks.__exit__()
        return True

    def note(self, y: Tensor, make: Make, x: Tensor, residual: Tensor | None) -> None:
        """Note how an output is computed, unless the chain of recipes would become too long."""
        if self.longest == 0:
            return
        source, added = self._source(x), None if residual is None else self._source(residual)
        lengths = [each.length for each in (source, added) if isinstance(each, Recipe)]
        if max(lengths, default=0) >= self.longest:
            source, added = Held(x), None if residual is None else Held(residual)
            lengths = []
        for each in (source, added):
            if isinstance(each, Recipe):
                each.saved += 1
        storage = y.untyped_storage()
        recipe = Recipe(y, make, source, added, 1 + max(lengths, default=0))
        self._known[storage._cdata] = StorageWeakRef(storage), y._version, recipe

    def _source(self, tensor: Tensor) -> Held | Recipe:
        recipe = self._recipe_of(tensor)
        return Held(tensor) if recipe is None or recipe.layout != layout_of(tensor) else recipe

    def _recipe_of(self, tensor: Tensor) -> Recipe | None:
        # Without a place in the graph it may be an alias by .data, whose version is its own.
        if tensor.grad_fn is None or tensor.is_inference() or tensor.is_nested or tensor.layout is not torch.strided:
            return None
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        _, version, recipe = known  # the weak reference keeps the address from being given to another storage
        same = tensor._version == version and tensor.dtype is recipe.dtype
        return recipe if same and not tensor.is_conj() and not tensor.is_neg() else None

    def _pack(self, tensor: Tensor) -> Packed:
        recipe = self._recipe_of(tensor) if type(tensor) is Tensor and self.runs() else None
        packed: Packed = Held(tensor)
        if recipe is not None:
            recipe.saved += 1
            layout = layout_of(tensor)
            packed = recipe if layout == recipe.layout else View(recipe, layout)
        if self.record is not None:
            self.record(tensor, packed)
        return packed


def _unpack(packed: Packed) -> Tensor:
    return packed.get()


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


class _Here(threading.local):
    frame: Frame | None = None

    def __init__(self) -> None:
        #: Ended calls whose hooks still lie below others: removed as soon as they are on top.
        self.ended: list[Frame] = []


_here = _Here()


def note(y: Tensor, make: Make, x: Tensor, residual: Tensor | None) -> None:
    """Note how an output is computed, if a call in this thread recomputes outputs."""
    frame = _here.frame
    if frame is not None:
        frame.note(y, make, x, residual)


def enter(module: nn.Module, longest: int) -> None:
    """Begin a call of a model, as a forward pre-hook; nothing if one runs already, or hooks of the user's do."""
    if torch.compiler.is_compiling() or transforms_active():  # torch.func takes no hooks on saved tensors
        return
    end_dead()
    if _here.frame is not None or not torch.is_grad_enabled() or saved_tensor_hooks(True) is not None:
        return
    with suppress(RuntimeError):  # torch.autograd.graph.disable_saved_tensors_hooks
        _begin(Frame(module, _getframe(2), longest))


def leave(module: nn.Module) -> None:
    """End the call of a model, as a forward hook that runs after an exception too."""
    frame = _here.frame
    if not torch.compiler.is_compiling() and frame is not None and frame.module is module and frame.is_of(_getframe(2)):
        _end(frame)


def end_dead(module: nn.Module | None = None) -> None:
    """End what calls in this thread left behind: those that KeyboardInterrupt ended, and those of a module."""
    frame = _here.frame
    if frame is not None and (not frame.runs() or frame.module is module):
        _end(frame)
    while _here.ended and _here.ended[-1].remove_hooks():
        _here.ended.pop()


@contextmanager
def recorded(module: nn.Module, longest: int, record: Callable[[Tensor, Packed], None]) -> Iterator[None]:
    """Record what calls of a model keep for the backward, within a block of the caller's."""
    frame = Frame(module, _getframe(2), longest, record)
    _begin(frame)
    try:
        yield
    finally:
        _end(frame)


def _begin(frame: Frame) -> None:
    global calls
    _here.frame = frame
    with _lock:
        calls += 1


def _end(frame: Frame) -> None:
    global calls
    _here.frame = None
    with _lock:
        calls -= 1
    frame.close()
    if not frame.remove_hooks():
        _here.ended.append(frame)
