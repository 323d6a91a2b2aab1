"""Pausing: forwards in training that do not update the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keelnorm.control.layer_hooks import paused, updating
from keelnorm.control.layer_selection import Where, select_some


@contextmanager
def pause_statistics(model: torch.nn.Module, *, where: Where = None) -> Iterator[list[str]]:
    """Keep running statistics from changing inside the block, or the decorated function.

    Layers in training still normalize with the batch. For forwards whose batch must not count, or not count twice: the
    second forward of SAM, a teacher's forward, generated data. Evaluation and frozen layers work as usual.

    Args:
        model: A model, or a layer.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.

    Returns:
        The paths of the layers, as the value of ``with``. Layers without running statistics are not among them.

    State:
        No buffer or attribute changes, but ``track_running_stats`` of torch.nn's layers is off during a call. Blocks
        may be nested and may end in any order. A copy of the model made inside the block is not paused.
        ``reset_running_stats`` still resets.

    Cost:
        None for keelnorm's layers, which stay compiled. Models with torch.nn's layers run uncompiled inside the block.

    Raises:
        TypeError, ValueError: ``model`` is not a module; it has no batch norm, or ``where`` selects none.

    Example:
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> with pause_statistics(layer):
        ...     y = layer(torch.randn(8, 3))
        >>> layer.num_batches_tracked.item(), layer.running_mean.tolist()
        (0, [0.0, 0.0, 0.0])
    """
    layers = updating(select_some("pause_statistics", model, where))
    with paused(layers.values()):
        yield list(layers)
