"""Where results wait: inside the call of a converted model, and nowhere else."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from sys import _getframe
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from keelnorm.engine.fusion.deferred_tensor import DeferredTensor, settle

_LEAVES = "its result leaves the model"
_HOOKED = "a module with hooks takes or returns its result"


class Scope:
    """One call within which results may wait.

    Args:
        frame: The call's frame, whose end ends the scope even if nobody closes it; None where ``finally`` does.
    """

    __slots__ = ("_deferred", "_frame", "_guards", "_modes", "module", "thread")

    def __init__(self, module: nn.Module, frame: FrameType | None) -> None:
        self.module, self.thread = module, threading.get_ident()
        self._frame = frame
        self._deferred: list[weakref.ref[Tensor]] = []
        self._guards: list[Any] = []
        self._modes = torch._C._len_torch_function_stack()

    def is_open(self) -> bool:
        """Whether the call still runs, and nothing that looks at every operation has begun inside it."""
        if torch._C._len_torch_function_stack() != self._modes or torch._C._len_torch_dispatch_stack() > 0:
            return False
        return self._frame is None or _runs(self._frame)

    def track(self, tensor: Tensor) -> Tensor:
        """Settle a deferred tensor when the scope closes, if it still is one."""
        self._deferred.append(weakref.ref(tensor))
        return tensor

    def settle(self, reason: str, learn: bool = True) -> None:
        """Make all results plain that still wait; see :func:`keelnorm.engine.fusion.deferred_tensor.settle`."""
        waiting, self._deferred = self._deferred, []
        for reference in waiting:
            tensor = reference()
            if type(tensor) is DeferredTensor:
                settle(tensor, reason, learn)

    def guard(self) -> None:
        """Settle everything before a module with hooks is entered or left: hooks see plain tensors."""
        guard = _Guard(self)
        self._guards = [
            torch_module.register_module_forward_pre_hook(guard),
            torch_module.register_module_forward_hook(guard),
        ]

    def end(self) -> None:
        """Nothing waits in here any more."""
        for handle in self._guards:
            handle.remove()
        self._guards, self._frame = [], None


class _Guard:
    """A hook of all modules, for as long as a scope is open."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if _here.scope is self.scope and module is not self.scope.module and has_hooks(module):
            self.scope.settle(_HOOKED, learn=False)


class _Here(threading.local):
    """A thread's scope: that of the outermost call."""

    scope: Scope | None = None
    #: The module that is called, and the call's frame; its scope is None where nothing may wait in it.
    module: nn.Module | None = None
    frame: FrameType | None = None

    def enter(self, module: nn.Module, frame: FrameType | None) -> None:
        self.module, self.frame, self.scope = module, frame, _scope_for(module, frame)

    def leave(self) -> None:
        if self.scope is not None:
            self.scope.end()
        self.module = self.frame = self.scope = None

    def is_taken(self) -> bool:
        """Whether a call runs. One that was left by what hooks do not see, such as KeyboardInterrupt, is forgotten."""
        if self.frame is not None and not _runs(self.frame):
            self.leave()
        return self.module is not None


_here = _Here()


def current() -> Scope | None:
    """The scope of the call that runs in this thread."""
    return _here.scope


def open_scope(module: nn.Module, _: Any) -> None:
    """A forward pre-hook of a converted model."""
    if not torch.compiler.is_compiling() and not _here.is_taken():
        _here.enter(module, _getframe(1))


def close_scope(module: nn.Module, _: Any, __: Any) -> None:
    """A forward hook of a converted model, which runs after an exception too."""
    if torch.compiler.is_compiling() or module is not _here.module or _here.frame is None:
        return
    caller, opened, scope = _getframe(1), _here.frame, _here.scope
    if caller not in (opened, opened.f_back):
        return
    # After an exception torch calls from further out. It is the one to be seen, and not what settling may add.
    with suppress(RuntimeError) if caller is not opened else nullcontext():
        try:
            if scope is not None:
                scope.settle(_LEAVES)
        finally:
            _here.leave()


def add_scope(module: nn.Module) -> None:
    """Let results wait within the module's calls, unless they may already."""
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
    """Whether results may wait within the module's calls."""
    return open_scope in module._forward_pre_hooks.values()


@contextmanager
def scope_of(module: nn.Module) -> Iterator[None]:
    """A scope for as long as the block runs, where none is open."""
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


def _runs(frame: FrameType) -> bool:
    try:
        frame.clear()  # refuses while it runs
    except RuntimeError:
        return True
    return False


def _scope_for(module: nn.Module, frame: FrameType | None) -> Scope | None:
    """A scope for a module's call, or None where results must not wait in it."""
    if not _may_wait():
        return None
    hooked = False
    for part in module.modules():
        if part._compiled_call_impl is not None or type(part) is _compiled_module():
            return None  # what is compiled looks at its arguments' classes
        hooked = hooked or (part is not module and has_hooks(part))
    scope = Scope(module, frame)
    if hooked:
        scope.guard()
    return scope


def _may_wait() -> bool:
    """Whether nothing is at work that has to see every operation, or every value."""
    if (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.is_inference_mode_enabled()  # which counts no changes in place
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or has_global_hooks()
    ):
        return False
    return torch._C._len_torch_function_stack() == 0 or all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, besides those that open a scope."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or (module._forward_hooks and _others(module._forward_hooks))
        or (module._forward_pre_hooks and _others(module._forward_pre_hooks))
    )


def has_global_hooks() -> bool:
    """Whether there are hooks of all modules, besides those that open a scope."""
    return bool(
        torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or _others(torch_module._global_forward_hooks)
        or _others(torch_module._global_forward_pre_hooks)
    )


def _others(hooks: Mapping[int, Any]) -> bool:
    """Whether there are hooks besides those of this module."""
    return any(hook not in (open_scope, close_scope) and type(hook) is not _Guard for hook in hooks.values())


def _compiled_module() -> type | None:
    """The class of torch.compile's results, if that has been used."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return None if dynamo is None else dynamo.OptimizedModule
