"""Outputs of batch norms that are recomputed in the backward instead of being kept for it.

Autograd keeps y = act(bn(x) + residual) for whatever reads it: the next convolution, a pooling, ReLU's own gradient.
The batch norm's gradient needs x, which is kept anyway, and y is a cheap function of x. So while a model runs, hooks on
saved tensors keep a :class:`Recipe` instead of y, and the backward computes y again, bit for bit.

Here such calls begin and end, in every thread; `engine.recognized_outputs` knows the outputs of one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from sys import _getframe
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from keelnorm.engine.error_messages import RefusedValueError, describe, is_count
from keelnorm.engine.noted_steps import NotedStep
from keelnorm.engine.output_recipes import Make, Packed
from keelnorm.engine.recognized_outputs import Frame
from keelnorm.engine.torch_internals import (
    called_while_tracing,
    compiled_original,
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
    if compiled_original(module) is not None:
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
