"""Running moments that forget the batches whose optimizer step a gradient scaler skips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.control.pausing import with_running_moments
from evenkeel.control.selection import Where, select
from evenkeel.errors import describe


class Scaler(Protocol):
    """What is asked of a gradient scaler; ``torch.amp.GradScaler`` is one."""

    def get_scale(self) -> float: ...


@contextmanager
def follow_scaler(model: torch.nn.Module, scaler: Scaler, *, where: Where = None) -> Iterator[list[str]]:
    """Around one optimizer step: where the scaler skips it, the running moments are as before the block.

    A gradient scaler skips the step when a gradient is not finite, and lowers its scale. The weights then stay what
    they were, but the forward has already counted the batch. A channel that itself held a NaN or an infinity is left
    alone by evenkeel's layers without this (``skipped_updates``); the block also undoes what the batch did to the other
    channels, and to ``torch.nn``'s layers.

    Args:
        model: A model, or a layer.
        scaler: Has ``get_scale()``, as ``torch.amp.GradScaler``. The block has to contain its ``update()``.
        where: A pattern for the layers' paths, a module's path, or several; None for all.

    Returns:
        The paths of the layers, as the value of ``with``. Layers without running moments are not among them.

    State:
        ``running_mean``, ``running_var`` and ``num_batches_tracked`` are put back where the scale has become smaller;
        in a channel of evenkeel's layers where that changed something, ``skipped_updates`` counts it. After an
        exception they are put back too: there was no step.

    Cost:
        A copy of the buffers, and two calls of ``get_scale``, which wait for the device, as the scaler's ``step`` does.

    Raises:
        TypeError, ValueError: ``model`` is no module, or ``scaler`` no scaler; a pattern matches no layer.

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
    layers = with_running_moments(select("follow_scaler", model, where))
    before = {layer: _copies(layer) for layer in layers.values()}
    scale = scaler.get_scale()
    try:
        yield list(layers)
        if scaler.get_scale() >= scale:
            before.clear()
    finally:
        for layer, buffers in before.items():
            _put_back(layer, buffers)


_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def _copies(layer: _BatchNorm) -> dict[str, Tensor]:
    return {name: layer._buffers[name].clone() for name in _NAMES if layer._buffers.get(name) is not None}  # type: ignore[union-attr]


def _put_back(layer: _BatchNorm, buffers: dict[str, Any]) -> None:
    with torch.no_grad():
        skipped = layer._buffers.get("skipped_updates")
        mean, var = (getattr(layer, name) for name in _NAMES[:2])
        if skipped is not None and skipped.device == mean.device:
            skipped.add_((mean != buffers["running_mean"]) | (var != buffers["running_var"]))
        for name, values in buffers.items():
            getattr(layer, name).copy_(values)
