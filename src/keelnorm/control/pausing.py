"""Forwards that normalize with the batch and leave the running statistics alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keelnorm.control.layer_hooks import held_off, updating
from keelnorm.control.layer_selection import Where, select_some


@contextmanager
def pause_statistics(model: torch.nn.Module, *, where: Where = None) -> Iterator[list[str]]:
    """Inside the block, or the decorated function, training normalizes with the batch and updates no running
    statistics.

    For forwards whose batch must not count, or not count twice: the second one of SAM, a teacher's, those on
    perturbed or generated data. Evaluation and frozen layers normalize with the running statistics, as ever.

    Args:
        model: A model, or a layer.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.

    Returns:
        The paths of the layers, as the value of ``with``. Layers without running statistics are not among them.

    State:
        Nothing of the layers changes, and what they are set to stays what it is: ``track_running_stats`` is off during
        a call of torch.nn's layers, who know no other way. Blocks may be nested and end in any order. A copy of the
        model made inside the block is not paused. ``reset_running_stats`` resets.

    Cost:
        None; but where torch.nn's layers take part, compiled models run uncompiled inside the block. Keelnorm's layers
        stay compiled.

    Raises:
        TypeError, ValueError: ``model`` is no module; there is no batch norm, or none that ``where`` means.

    Example:
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> with pause_statistics(layer):
        ...     y = layer(torch.randn(8, 3))
        >>> layer.num_batches_tracked.item(), layer.running_mean.tolist()
        (0, [0.0, 0.0, 0.0])
    """
    layers = updating(select_some("pause_statistics", model, where))
    with held_off(layers.values()):
        yield list(layers)
