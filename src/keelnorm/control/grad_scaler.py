"""Gradient scalers: undo the running statistics' update where the scaler skips the optimizer step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from keelnorm.control.layer_hooks import control_of, updating
from keelnorm.control.layer_selection import Where, select_some
from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.engine.update_counts import SKIPPED
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.nn._shared.variant import Variant


class Scaler(Protocol):
    """A gradient scaler, such as ``torch.amp.GradScaler``."""

    def get_scale(self) -> float:
        """The present scale."""
        ...


@contextmanager
def follow_scaler(
    model: torch.nn.Module, scaler: Scaler, optimizer: Optimizer | None = None, *, where: Where = None
) -> Iterator[list[str]]:
    """Restore the running statistics after the block if the scaler skipped the optimizer step inside.

    A gradient scaler skips the step when a gradient is not finite, and lowers its scale. The weights then stay the
    same, but the forward has already updated the running statistics. keelnorm's layers never update a channel with a
    NaN or an infinity (``skipped_updates``); this block also undoes the update of the other channels, and of
    ``torch.nn``'s layers.

    Args:
        model: A model, or a layer.
        scaler: Has ``get_scale()``, as ``torch.amp.GradScaler``. The block has to contain its ``update()``.
        optimizer: The optimizer whose step is meant; None for those of the model's parameters. Several optimizers may
            share a scaler, whose scale falls when any of them is skipped: a model whose own optimizer has stepped keeps
            its running statistics.
        where: A pattern for the layers' paths, a module's path, or several; None for all.

    Returns:
        The paths of the layers, as the value of ``with``. Layers without running statistics are not among them.

    State:
        If the scale has fallen and the optimizer has not stepped, the layers' buffers and their windows of recent
        batches are restored, and ``skipped_updates`` of keelnorm's layers counts the channels where that changed
        something. Moments that :func:`accumulate_statistics` pooled in the block are dropped. After an exception
        everything is restored too: there was no step.

    Cost:
        A copy of the buffers, and two calls of ``get_scale``, which wait for the device, as the scaler's ``step`` does.

    Raises:
        TypeError, ValueError: ``model``, ``scaler`` or ``optimizer`` is of another type; the model has no batch norm,
            or ``where`` selects none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scaler = torch.amp.GradScaler("cpu")
        >>> with follow_scaler(model, scaler):
        ...     loss = model(torch.randn(8, 3)).sum() * float("inf")
        ...     scaler.scale(loss).backward()
        ...     scaler.step(optimizer)
        ...     scaler.update()
        >>> model[0].num_batches_tracked.item()
        0
    """
    if not callable(getattr(scaler, "get_scale", None)):
        raise TypeError(
            "follow_scaler: scaler must be a gradient scaler with get_scale(), such as torch.amp.GradScaler; got "
            f"{describe(scaler)}"
        )
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"follow_scaler: optimizer must be a torch.optim.Optimizer or None; got {describe(optimizer)}. The "
            "layers' paths go to where="
        )
    layers = updating(select_some("follow_scaler", model, where))
    before = [_Before(layer) for layer in layers.values()]
    groups = [] if optimizer is None else optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]] if optimizer is not None else model.parameters()
    scale = scaler.get_scale()
    try:
        with _noting_steps(parameters) as stepped:
            yield list(layers)
        if stepped or scaler.get_scale() >= scale:
            before.clear()
    finally:
        for each in before:
            each.restore()


@contextmanager
def _noting_steps(parameters: Iterable[Tensor]) -> Iterator[list[Optimizer]]:
    """Collect the optimizers that step inside the block and hold one of the parameters."""
    meant, stepped = {id(parameter) for parameter in parameters}, list[Optimizer]()

    def note(optimizer: Optimizer, *_: Any) -> None:
        # Fused optimizers are called even if the step is skipped, and check this themselves.
        skips = getattr(optimizer, "found_inf", None)
        changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not meant.isdisjoint(changed) and (skips is None or not bool(skips)):
            stepped.append(optimizer)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield stepped
    finally:
        handle.remove()


class _Before:
    """A snapshot of what a layer counts: buffers, counts, windows and pool."""

    def __init__(self, layer: BatchNormBase) -> None:
        control = control_of(layer)
        self.layer, self._pool = layer, None if control is None else control.pool
        self._moments = None if self._pool is None else self._pool.moments
        #: A lazy layer has no buffers yet.
        self._lazy = _is_lazy(layer)
        self._buffers = {
            name: value.clone() for name, value in layer._buffers.items() if value is not None and not self._lazy
        }
        counts = layer.update_counts() if isinstance(layer, CountsSkipped) else None
        self._counts = None if counts is None else counts.clone()
        self._kept = {name: list(value) for name, value in vars(layer).items() if isinstance(value, deque)}
        changed = layer.changed_by_forward if isinstance(layer, Variant) else ()
        self._attributes = {name: getattr(layer, name) for name in changed}

    def restore(self) -> None:
        """Put everything back, and count it in ``skipped_updates``."""
        layer = self.layer
        if self._pool is not None:
            self._pool.moments = self._moments
        vars(layer).update(self._attributes)
        for name, kept in self._kept.items():
            window = vars(layer)[name]  # in place: a backward may still hold it
            window.clear()
            window.extend(kept)
        if self._lazy:
            if not _is_lazy(layer):
                layer.reset_running_stats()
            return
        with torch.no_grad():
            counts = layer.update_counts() if isinstance(layer, CountsSkipped) else None
            if counts is not None and self._counts is not None:
                mean, var = (getattr(layer, name) for name in ("running_mean", "running_var"))
                counts[SKIPPED] += (mean != self._buffers["running_mean"]) | (var != self._buffers["running_var"])
                counts[SKIPPED + 1 :] = self._counts[SKIPPED + 1 :]  # the counts of the cumulative average
            for name, values in self._buffers.items():
                getattr(layer, name).copy_(values)


def _is_lazy(layer: BatchNormBase) -> bool:
    return layer.running_mean is not None and is_lazy(layer.running_mean)
