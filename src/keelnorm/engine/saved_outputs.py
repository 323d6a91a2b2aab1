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
from torch.utils.hooks import RemovableHandle

from keelnorm.engine.error_messages import RefusedValueError, describe, is_count
from keelnorm.engine.noted_steps import NotedStep
from keelnorm.engine.output_recipes import Held, Make, Packed, Recipe, View, layout_of, recipe_of
from keelnorm.engine.recomputation import is_running
from keelnorm.engine.torch_internals import (
    called_while_tracing,
    compiled_module_class,
    saved_tensor_hooks,
    transforms_active,
)

#: The longest chain that may be asked for: a backward recurses so deep.
LONGEST = 64
#: How many calls of models, in all threads, recompute outputs now. Read before anything else, so that it costs nothing.
calls = 0
_running: list[Frame] = []
#: Hooks that end calls, of models whose other hooks were removed while they ran in another thread.
_waiting: list[tuple[nn.Module, RemovableHandle]] = []
_lock = threading.RLock()
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
        #: The operation that runs in `run_noted`: its first tensor, what that is computed from, and what it has saved.
        self._step: tuple[Tensor, Packed, list[Held]] | None = None
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

    def is_on_top(self) -> bool:
        """Return whether no hooks of others were put on top of these."""
        top = saved_tensor_hooks(True)
        return top is not None and top[0] == self._pack

    def remove_hooks(self) -> bool:
        """Remove the hooks, unless others were put on top of them; return whether they are gone."""
        if not self.is_on_top():
            return False
        self._hooks.__exit__()
        return True

    def note(self, y: Tensor, make: Make, *given: Tensor | None) -> None:
        """Note how an output is computed; from recipes of what is given, unless the chain would become too long."""
        sources = tuple(None if each is None else self._source(each) for each in given)
        longest = _longest(sources)
        if longest >= self.longest:
            sources, longest = tuple(None if each is None else Held(each) for each in given), 0
        self._know(y, Recipe(y, make, sources, longest + 1))

    def note_after(self, y: Tensor, make: Make, outputs: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
        """Note how a copy is computed from outputs that are noted; without them it would take as much to keep them."""
        sources = tuple(map(self._source, (*outputs, *others)))
        if all(recipe_of(source) is not None for source in sources[: len(outputs)]):
            self._know(y, Recipe(y, make, sources, _longest(sources)))

    def run_noted(self, step: NotedStep) -> Any:
        """Run an operation on an output, and note how its result is computed."""
        sources = tuple(map(self._source, step.tensors))
        if recipe_of(sources[0]) is None:
            return step.run()
        saved: list[Held] = []
        self._step = step.tensors[0], sources[0], saved
        try:
            result = step.run()
        finally:
            self._step = None
        if type(result) is Tensor and result.dtype is step.tensors[0].dtype:
            recipe = Recipe(result, step.maker(), sources, _longest(sources))
            self._know(result, recipe)
            for held in saved:  # the result itself, as relu saves it before anyone can know how it is computed
                if held.version == result._version and _is_same(held.tensor, result):
                    recipe.save()
                    held.replace(recipe)
        return result

    def _know(self, y: Tensor, recipe: Recipe) -> None:
        storage = y.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage), y._version, recipe

    def _source(self, tensor: Tensor) -> Packed:
        recipe = self._recipe_of(tensor)
        if recipe is None:
            return Held(tensor)
        layout = layout_of(tensor)
        return recipe if layout == recipe.layout else View(recipe, layout)

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
        packed = self._source(tensor) if type(tensor) is Tensor and self.runs() else Held(tensor)
        if self._step is not None and isinstance(packed, Held):
            given, source, saved = self._step
            if _is_copy(tensor, given):  # relu6_ saves one of what it overwrites
                packed = source
            else:
                saved.append(packed)
        recipe = recipe_of(packed)
        if recipe is not None:
            recipe.save()
        if self.record is not None:
            self.record(tensor, packed)
        return packed


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same memory in the same layout."""
    if (
        one.layout is not torch.strided
        or one.is_nested
        or one.is_conj()
        or one.is_neg()
        or one.dtype is not other.dtype
    ):
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata and layout_of(one) == layout_of(other)


def _is_copy(one: Tensor, other: Tensor) -> bool:
    """Return whether a tensor has the values of another one, in memory of its own and in the same layout."""
    if one.layout is not torch.strided or one.is_nested or one.dtype is not other.dtype:
        return False
    apart = one.untyped_storage()._cdata != other.untyped_storage()._cdata
    if not apart or layout_of(one) != layout_of(other) or not torch.equal(one, other):
        return False
    return torch.equal(one.signbit(), other.signbit())  # 0 and −0 are equal


def _longest(sources: tuple[Packed | None, ...]) -> int:
    return max((recipe.length for recipe in map(recipe_of, sources) if recipe is not None), default=0)


def _unpack(packed: Packed) -> Tensor:
    return packed.get()


class _Here(threading.local):
    frame: Frame | None = None

    def __init__(self) -> None:
        #: Ended calls whose hooks still lie below others: removed as soon as they are on top.
        self.ended: list[Frame] = []


_here = _Here()


def note(y: Tensor, make: Make, *given: Tensor | None) -> None:
    """Note how an output is computed, where outputs are recomputed."""
    frame = _frame()
    if frame is not None:
        frame.note(y, make, *given)


def note_after(y: Tensor, make: Make, outputs: tuple[Tensor, ...], others: tuple[Tensor, ...] = ()) -> None:
    """Note how a copy of outputs is computed from these, where outputs are recomputed."""
    frame = _frame()
    if frame is not None:
        frame.note_after(y, make, outputs, others)


def run_noted(step: NotedStep) -> Any:
    """Run an operation on an output; where outputs are recomputed, note how its result is computed."""
    frame = _frame()
    return step.run() if frame is None or not step.can_repeat() else frame.run_noted(step)


def are_recomputed() -> bool:
    """Return whether outputs are recomputed now, in this thread."""
    return _frame() is not None


def _frame() -> Frame | None:
    """Return the call that recomputes outputs in this thread; None where others' hooks, as a checkpoint's, act."""
    frame = _here.frame
    return frame if frame is not None and frame.longest > 0 and frame.is_on_top() else None


def enter(module: nn.Module, longest: int, last: Callable[..., None]) -> None:
    """Begin a call of a model, as a forward pre-hook; nothing if one runs already, or hooks of the user's do.

    Args:
        last: The forward hook that ends the call.
    """
    if torch.compiler.is_compiling():
        _announce_compiler()
        return
    kind = compiled_module_class()
    if kind is not None and isinstance(module, kind):
        _announce_compiler()
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
    with _lock:  # another thread may be removing the hooks
        if not any(hook is last for hook in module._forward_hooks.values()):
            return
        try:
            _begin(Frame(module, _getframe(2), longest))
        except RuntimeError as error:  # torch.autograd.graph.disable_saved_tensors_hooks
            _announce(f"hooks on saved tensors are disabled ({error})")


def _announce(reason: str) -> None:
    if reason not in _announced:
        _announced.add(reason)
        _log.warning("save_memory: outputs are kept in such calls: %s", reason)


@called_while_tracing
def _announce_compiler() -> bool:
    _announce("torch.compile decides itself what its graphs keep")
    return True


def leave(module: nn.Module) -> None:
    """End the call of a model, as a forward hook that runs after an exception too."""
    frame = _here.frame
    if not torch.compiler.is_compiling() and frame is not None and frame.module is module and frame.is_of(_getframe(2)):
        _end(frame)


def stop(module: nn.Module, first: RemovableHandle, last: RemovableHandle) -> None:
    """Remove the hooks that begin and end a model's calls; one that runs in another thread ends as it began."""
    with _lock:
        first.remove()
    end_dead(module)
    with _lock:
        _waiting.append((module, last))
        _remove_hooks()


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
    with _lock:
        _begin(frame)
    try:
        yield
    finally:
        _end(frame)


def _begin(frame: Frame) -> None:
    global calls
    _here.frame = frame
    _running.append(frame)
    calls = len(_running)


def _end(frame: Frame) -> None:
    global calls
    _here.frame = None
    with _lock:
        _running.remove(frame)
        calls = len(_running)
        _remove_hooks()
    frame.close()
    if not frame.remove_hooks():
        _here.ended.append(frame)


def _remove_hooks() -> None:
    """Remove the hooks that waited for calls which have ended."""
    busy = {id(frame.module) for frame in _running if frame.runs()}
    for module, handle in _waiting:
        if id(module) not in busy:
            handle.remove()
    _waiting[:] = [each for each in _waiting if id(each[0]) in busy]
