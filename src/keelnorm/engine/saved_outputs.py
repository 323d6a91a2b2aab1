"""Outputs of batch norms that are recomputed in the backward instead of being kept for it.

Autograd keeps y = act(bn(x) + residual) for whatever reads it: the next convolution, a pooling, ReLU's own gradient.
The batch norm's gradient needs x, which is kept anyway, and y is a cheap function of x. So while a model runs, hooks on
saved tensors keep a :class:`Recipe` instead of y, and the backward computes y again, bit for bit.

An output is recognized by its storage and its version. A weak reference keeps the storage's address from being given to
another one, and a tensor that was changed in place is kept as it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from sys import _getframe
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from keelnorm.engine.error_messages import RefusedValueError, describe, is_count
from keelnorm.engine.output_recipes import Held, Make, Packed, Recipe, View, layout_of
from keelnorm.engine.recomputation import is_running
from keelnorm.engine.torch_internals import saved_tensor_hooks, transforms_active

#: The longest chain that may be asked for: a backward recurses so deep.
LONGEST = 64
#: How many calls of models, in all threads, recompute outputs now. Read before anything else, so that it costs nothing.
calls = 0
_lock = threading.Lock()
_log = logging.getLogger("keelnorm")
#: Why outputs were kept, each reason logged once.
_announced: set[str] = set()


def check_longest(what: str, longest: Any) -> None:
    """Raise unless ``longest`` is a number of recipes that a chain may have."""
    if not is_count(longest) or longest > LONGEST:
        raise RefusedValueError(f"{what}: longest is an integer from 1 to {LONGEST}; got {describe(longest)}")


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
        """Return whether a hook is called for this very call; after an exception torch does so from the outer frame."""
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
    if torch.compiler.is_compiling():  # which recomputes by itself, and could not trace a message
        return
    if transforms_active():
        _announce("torch.func takes no hooks on saved tensors")
        return
    end_dead()
    if _here.frame is not None or not torch.is_grad_enabled():
        return
    if saved_tensor_hooks(True) is not None:
        _announce("other hooks on saved tensors are active around the call, and act alone")
        return
    try:
        _begin(Frame(module, _getframe(2), longest))
    except RuntimeError as error:  # torch.autograd.graph.disable_saved_tensors_hooks
        _announce(f"hooks on saved tensors are disabled ({error})")


def _announce(reason: str) -> None:
    if reason not in _announced:
        _announced.add(reason)
        _log.warning("save_memory: outputs are kept in such calls: %s", reason)


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
