"""How blocks reach a layer: keelnorm's layers read their control themselves, torch.nn's get two hooks that do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.functional import moments as moments_of
from keelnorm.moments import Moments
from keelnorm.nn._shared.statistics_control import Control, Controlled

#: The attributes that the hooks replace during a call: the flag, and the check of the input.
_FLAG, _CHECK = "track_running_stats", "_check_input_dim"
#: Guards what blocks and forwards of several threads change.
_lock = threading.RLock()


def control_of(layer: BatchNormBase) -> Control | None:
    """The layer's control while a block is open, else None."""
    if isinstance(layer, Controlled):
        return layer._control
    around = _around(layer)
    return None if around is None else around.control


def updating(layers: dict[str, BatchNormBase]) -> dict[str, BatchNormBase]:
    """The layers that update running statistics in training, or would without an open block."""
    return {path: layer for path, layer in layers.items() if layer.running_mean is not None and _tracks(layer)}


def _tracks(layer: BatchNormBase) -> bool:
    around = _around(layer)
    return layer.track_running_stats if around is None else around.tracks(layer)


@contextmanager
def controlled(layer: BatchNormBase) -> Iterator[Control]:
    """Give the layer a control inside the block. Blocks may end in any order."""
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
def paused(layers: Iterable[BatchNormBase]) -> Iterator[None]:
    """Keep the layers from updating their running statistics inside the block."""
    layers = list(layers)
    with ExitStack() as stack:
        if not all(isinstance(layer, Controlled) for layer in layers):
            stack.enter_context(uncompiled())
        for layer in layers:
            control = stack.enter_context(controlled(layer))
            _pause(control, 1)
            stack.callback(_pause, control, -1)
        yield


def _pause(control: Control, blocks: int) -> None:
    with _lock:
        control.pause(blocks)


def _attach(layer: BatchNormBase) -> Control:
    control = Control()
    if isinstance(layer, Controlled):
        vars(layer)["_control"] = control
    else:
        around = _Around(control)
        # A lazy layer's own hook runs first and creates the running statistics.
        layer.register_forward_pre_hook(around.before, with_kwargs=True)
        layer.register_forward_hook(around.after, prepend=True, with_kwargs=True, always_call=True)
    return control


def _detach(layer: BatchNormBase, control: Control) -> None:
    # Both ways are undone: the layer's class may have changed meanwhile.
    if vars(layer).get("_control") is control:
        del vars(layer)["_control"]
    around = _around(layer)
    if around is not None and around.control is control:
        around.remove(layer)


def _around(layer: Module) -> _Around | None:
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, _Around) and owner.control is not None), None)


class _Seen(threading.local):
    """What a thread's call has normalized so far; None if the call does not count."""

    moments: list[Moments] | None = None
    looked = False
    #: The first argument's version before the forward.
    version: int | None = None


class _Around:
    """The two hooks of a torch.nn layer: ``track_running_stats`` is off during each call, and restored after it.

    The layer's check of its input shows the tensor that is normalized, which in a subclass may differ from the
    argument. A forward without that check is taken to normalize its first argument.

    Args:
        control: The layer's control; None in a copy of the layer, where the hooks remove themselves at the first call.
    """

    def __init__(self, control: Control | None = None) -> None:
        self.control = control
        #: For each running layer (replicas may run in other threads): the number of calls, and its own attributes.
        self._running: dict[BatchNormBase, tuple[int, dict[str, Any]]] = {}
        self._seen = _Seen()

    def tracks(self, layer: BatchNormBase) -> bool:
        """The layer's flag as the user set it."""
        attributes = self._running[layer][1] if layer in self._running else vars(layer)
        return bool(attributes[_FLAG])

    def before(self, layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """The forward pre-hook: switch the flag off, and watch the layer's check of its input."""
        if self.control is None:
            self.remove(layer)
            return
        with _lock:
            counts = layer.training and self.tracks(layer) and not self.control.paused and not is_second_run()
            own = {name: vars(layer)[name] for name in (_FLAG, _CHECK) if name in vars(layer)}
            calls, own = self._running.get(layer, (0, own))
            self._running[layer] = calls + 1, own
            layer.track_running_stats = False
            layer._check_input_dim = partial(
                self._look, own.get(_CHECK) or partial(type(layer)._check_input_dim, layer)
            )
        seen = self._seen
        seen.moments, seen.looked = [] if counts and self.control.pool is not None else None, False
        seen.version = _version(_first(inputs, keywords))

    def _look(self, check: Callable[[Tensor], None], x: Tensor) -> None:
        check(x)
        self._seen.looked = True
        if self._seen.moments is not None and x.numel() > 0:
            self._seen.moments.append(moments_of(x.detach()))

    def after(self, layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        """The forward hook: restore the flag, and pool the moments of what was normalized."""
        with _lock:
            if layer in self._running:
                self._leave(layer)
        moments, self._seen.moments = self._seen.moments, None
        if result is None or moments is None or self.control is None or self.control.pool is None:
            return
        if not self._seen.looked:
            x = _first(inputs, keywords)
            if not isinstance(x, Tensor) or _version(x) != self._seen.version:
                raise RuntimeError(
                    f"accumulate_statistics: a {type(layer).__name__} has a forward of its own that overwrites its "
                    "input, so its moments can't be computed. Leave it out by where="
                )
            moments.append(moments_of(x.detach(), keywords.get("mask")))
        for each in moments:
            self.control.pool.take(each)

    def _leave(self, layer: BatchNormBase) -> None:
        calls, own = self._running.pop(layer)
        if calls > 1:
            self._running[layer] = calls - 1, own
        else:
            vars(layer).pop(_CHECK, None)
            vars(layer).update(own)

    def remove(self, layer: Module) -> None:
        """Remove the hooks from a layer, and restore the flag of an interrupted call."""
        for owner, (_, own) in list(self._running.items()):
            self._running[owner] = 1, own
            self._leave(owner)
        tables = (
            layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs,
            layer._forward_hooks, layer._forward_hooks_with_kwargs, layer._forward_hooks_always_called,
        )  # fmt: skip
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                for table in tables:
                    table.pop(key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Around:
        return _Around()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Around, ()


def _first(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return inputs[0] if inputs else keywords.get("input")


def _version(x: Any) -> int | None:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None
