"""Scopes: results wait inside the call of a converted model, and nowhere else."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from sys import _getframe
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from keelnorm.engine.fusion.deferred_tensor import DeferredTensor, settle
from keelnorm.engine.recomputation import is_running
from keelnorm.engine.torch_internals import (
    DeviceContext,
    compiled_original,
    dispatch_mode_count,
    function_mode_count,
    function_modes,
    global_backward_hooks,
    global_forward_hooks,
    transforms_active,
)

_LEAVES = "its result leaves the model"
_HOOKED = "a module with hooks takes or returns its result"


class Scope:
    """One call of a model, within which results may wait.

    Args:
        module: The model.
        frame: The call's frame; the scope ends with it even if nobody closes it. None where ``finally`` closes it.
        modes: How many modes saw each call of a function of torch when the model was called.
    """

    __slots__ = ("_deferred", "_frame", "_guards", "_modes", "module", "thread")

    def __init__(self, module: nn.Module, frame: FrameType | None, modes: int) -> None:
        self.module, self.thread = module, threading.get_ident()
        self._frame, self._modes = frame, modes
        self._deferred: list[weakref.ref[Tensor]] = []
        self._guards: list[Any] = []

    def is_open(self) -> bool:
        """Return whether the call still runs, and no mode that sees every operation was entered inside it."""
        if function_mode_count() != self._modes or dispatch_mode_count() > 0:
            return False
        return self._frame is None or is_running(self._frame)

    def track(self, tensor: Tensor) -> Tensor:
        """Settle a tensor when the scope closes, if it is still deferred."""
        self._deferred.append(weakref.ref(tensor))
        return tensor

    def settle(self, reason: str, learn: bool = True) -> None:
        """Settle all results that still wait; see :func:`keelnorm.engine.fusion.deferred_tensor.settle`."""
        waiting, self._deferred = self._deferred, []
        for reference in waiting:
            tensor = reference()
            if type(tensor) is DeferredTensor:
                settle(tensor, reason, learn)

    def guard(self) -> None:
        """Settle everything before a module with hooks is entered or left, since hooks must see plain tensors."""
        guard = _Guard(self)
        self._guards = [
            torch_module.register_module_forward_pre_hook(guard),
            torch_module.register_module_forward_hook(guard),
        ]

    def end(self) -> None:
        """End the scope: remove its hooks."""
        for handle in self._guards:
            handle.remove()
        self._guards, self._frame = [], None


class _Guard:
    """A global hook, for as long as a scope is open."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if _here.scope is self.scope and module is not self.scope.module and has_hooks(module):
            self.scope.settle(_HOOKED, learn=False)


class _Here(threading.local):
    """A thread's outermost call of a model, and its scope."""

    #: The module that is called, the call's frame, and how many function modes were active then.
    module: nn.Module | None = None
    frame: FrameType | None = None
    modes = 0
    #: Made when the first result may wait; None before that, and where nothing may.
    scope: Scope | None = None
    decided = False

    def enter(self, module: nn.Module, frame: FrameType | None) -> None:
        self.module, self.frame, self.modes = module, frame, function_mode_count()

    def leave(self) -> None:
        if self.scope is not None:
            self.scope.end()
        self.module = self.frame = self.scope = None
        self.decided = False

    def is_taken(self) -> bool:
        """Return whether a call runs. A call that KeyboardInterrupt ended, which hooks do not see, is forgotten."""
        if self.frame is not None and not is_running(self.frame):
            self.leave()
        return self.module is not None


_here = _Here()


def is_inside() -> bool:
    """Return whether a call of a model runs in this thread, within which results may wait."""
    return _here.module is not None


def current() -> Scope | None:
    """Return the scope of the call that runs in this thread; None where results must not wait."""
    if _here.module is not None and not _here.decided and _may_wait():
        _here.decided = True
        _here.scope = _scope_for(_here.module, _here.frame, _here.modes)
    return _here.scope


def open_scope(module: nn.Module, _: Any) -> None:
    """Open a scope: a forward pre-hook of a converted model."""
    if not torch.compiler.is_compiling() and not _here.is_taken():
        _here.enter(module, _getframe(1))


def close_scope(module: nn.Module, _: Any, __: Any) -> None:
    """Close the scope: a forward hook of a converted model, which also runs after an exception."""
    if torch.compiler.is_compiling() or module is not _here.module or _here.frame is None:
        return
    caller, opened, scope = _getframe(1), _here.frame, _here.scope
    if caller not in (opened, opened.f_back):
        return
    # After an exception torch calls the hook from an outer frame; an error of settling must not hide the exception.
    with suppress(RuntimeError) if caller is not opened else nullcontext():
        try:
            if scope is not None:
                scope.settle(_LEAVES)
        finally:
            _here.leave()


def add_scope(module: nn.Module) -> None:
    """Let results wait within the module's calls, unless they already do."""
    if not has_scope(module):
        module.register_forward_pre_hook(open_scope, prepend=True)
        module.register_forward_hook(close_scope, prepend=True, always_call=True)


def remove_scope(module: nn.Module) -> None:
    """Undo :func:`add_scope`."""
    for hooks, ours in ((module._forward_pre_hooks, open_scope), (module._forward_hooks, close_scope)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def has_scope(module: nn.Module) -> bool:
    """Return whether results may wait within the module's calls."""
    return open_scope in module._forward_pre_hooks.values()


@contextmanager
def scope_of(module: nn.Module) -> Iterator[None]:
    """Open a scope for a block, unless one is open."""
    if _here.is_taken():
        yield
        return
    _here.enter(module, None)
    try:
        yield
        if _here.scope is not None:
            _here.scope.settle(_LEAVES)
    finally:
        _here.leave()


def _scope_for(module: nn.Module, frame: FrameType | None, modes: int) -> Scope | None:
    """Return a scope for a module's call, or None where a part of it is compiled."""
    hooked = False
    for part in module.modules():
        if part._compiled_call_impl is not None or compiled_original(part) is not None:
            return None  # compiled code guards on its arguments' classes
        hooked = hooked or (part is not module and has_hooks(part))
    scope = Scope(module, frame, modes)
    if hooked:
        scope.guard()
    return scope


def _may_wait() -> bool:
    """Return whether nothing is active that must see every operation or every value."""
    if (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.is_inference_mode_enabled()  # which counts no changes in place
        or dispatch_mode_count() > 0
        or transforms_active()
        or has_global_hooks()
    ):
        return False
    return function_mode_count() == 0 or all(isinstance(mode, DeviceContext) for mode in function_modes())


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks besides those that open a scope."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or (module._forward_hooks and _others(module._forward_hooks.values()))
        or (module._forward_pre_hooks and _others(module._forward_pre_hooks.values()))
    )


def has_global_hooks() -> bool:
    """Return whether there are hooks of all modules, besides those that open a scope."""
    return global_backward_hooks() or _others(global_forward_hooks())


def _others(hooks: Iterable[Any]) -> bool:
    """Return whether there are hooks besides those of this file."""
    return any(hook not in (open_scope, close_scope) and type(hook) is not _Guard for hook in hooks)
