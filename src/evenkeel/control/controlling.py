"""How blocks reach a layer: evenkeel's ask their control themselves, around torch.nn's stand two hooks that do."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.control.uncompiled import uncompiled
from evenkeel.functional import moments as moments_of
from evenkeel.moments import Moments
from evenkeel.nn.controlled import Control, Controlled
from evenkeel.second_run import is_second_run

#: For what several threads' blocks and forwards change.
_lock = threading.RLock()


def control_of(layer: _BatchNorm) -> Control | None:
    """What the blocks that are open ask of the layer."""
    if isinstance(layer, Controlled):
        return layer._control
    around = _around(layer)
    return None if around is None else around.control


def updating(layers: dict[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Those of the layers that have running moments and update them in training, or would if no block held them off."""
    return {path: layer for path, layer in layers.items() if layer.running_mean is not None and _tracks(layer)}


def _tracks(layer: _BatchNorm) -> bool:
    around = _around(layer)
    return layer.track_running_stats if around is None else around.tracks(layer)


@contextmanager
def controlled(layer: _BatchNorm) -> Iterator[Control]:
    """Inside, the layer has a control. Blocks may end in any order."""
    with _lock:
        control = control_of(layer) or _attach(layer)
        control.blocks += 1
    try:
        yield control
    finally:
        with _lock:
            control.blocks -= 1
            if control.blocks == 0:
                _detach(layer, control)


@contextmanager
def held_off(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """The layers leave their running moments alone inside the block."""
    layers = list(layers)
    with ExitStack() as stack:
        if not all(isinstance(layer, Controlled) for layer in layers):
            stack.enter_context(uncompiled())
        for layer in layers:
            control = stack.enter_context(controlled(layer))
            with _lock:
                control.pause(1)
            stack.callback(control.pause, -1)
        yield


def _attach(layer: _BatchNorm) -> Control:
    control = Control()
    if isinstance(layer, Controlled):
        vars(layer)["_control"] = control
    else:
        around = _Around(control)
        # A lazy layer's own hook comes before, which makes what there is to track.
        layer.register_forward_pre_hook(around.before, with_kwargs=True)
        layer.register_forward_hook(around.after, prepend=True, always_call=True)
    return control


def _detach(layer: _BatchNorm, control: Control) -> None:
    if isinstance(layer, Controlled):
        vars(layer).pop("_control", None)
        return
    around = _around(layer)
    if around is not None and around.control is control:
        around.remove(layer)


def _around(layer: Module) -> _Around | None:
    for hook in layer._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _Around):
            return owner
    return None


class _Around:
    """The hooks of a layer whose forward asks its flag alone: it is off during each call, and what it was elsewhere.

    Args:
        control: What is asked; None in a copy of the layer, where the hooks take themselves off at the first call.
    """

    def __init__(self, control: Control | None = None) -> None:
        self.control = control
        #: For each layer that is running (a replica of it may be, in another thread): how often, and its flag.
        self._running: dict[_BatchNorm, tuple[int, bool]] = {}
        self._seen = threading.local()

    def tracks(self, layer: _BatchNorm) -> bool:
        """The layer's flag, as the user set it."""
        return self._running[layer][1] if layer in self._running else layer.track_running_stats

    # Looked at before the forward, which may overwrite its input; taken after it, which may raise.

    def before(self, layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.control is None:
            self.remove(layer)
            return
        with _lock:
            calls, flag = self._running.get(layer, (0, layer.track_running_stats))
            self._running[layer] = calls + 1, flag
            layer.track_running_stats = False
        self._seen.moments = None
        pooled = self.control.pool is not None and not self.control.paused
        if pooled and flag and layer.training and not is_second_run():
            x = inputs[0] if inputs else keywords.get("input")
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2 and x.numel() > 0:
                self._seen.moments = moments_of(x.detach(), keywords.get("mask"))

    def after(self, layer: Any, inputs: tuple[Any, ...], result: Any) -> None:
        with _lock:
            if layer not in self._running:
                return
            self._leave(layer)
        moments: Moments | None = self._seen.moments
        if result is not None and moments is not None and self.control is not None and self.control.pool is not None:
            self.control.pool.take(moments)
        self._seen.moments = None

    def _leave(self, layer: _BatchNorm) -> None:
        calls, flag = self._running.pop(layer)
        if calls > 1:
            self._running[layer] = calls - 1, flag
        else:
            layer.track_running_stats = flag

    def remove(self, layer: Module) -> None:
        """Take the hooks off a layer; an interrupted call may have left its flag off."""
        for owner, (_, flag) in self._running.items():
            owner.track_running_stats = flag
        self._running.clear()
        tables = (
            layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs,
            layer._forward_hooks, layer._forward_hooks_always_called,
        )  # fmt: skip
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                for table in tables:
                    table.pop(key, None)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Around:
        return _Around()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Around, ()
