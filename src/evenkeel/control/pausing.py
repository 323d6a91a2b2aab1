"""Forwards that normalize with the batch and leave the running moments alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.control.selection import Where, select

#: For each layer that is held off its running moments: by how many blocks, and its track_running_stats before them.
#: A count, so that blocks may end in any order.
_held: WeakKeyDictionary[_BatchNorm, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def pause_statistics(model: torch.nn.Module, *, where: Where = None) -> Iterator[list[str]]:
    """Inside the block, or the decorated function, training normalizes with the batch and updates no running moments.

    For forwards whose batch must not count, or not count twice: the second one of SAM, a teacher's, those on
    perturbed or generated data. Evaluation and frozen layers normalize with the running moments, as ever.

    Args:
        model: A model, or a layer.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.

    Returns:
        The paths of the layers, as the value of ``with``. Layers without running moments are not among them.

    State:
        ``track_running_stats`` of the layers is False inside the block, which is torch.nn's own way to say it, and as
        before afterwards, also after an exception. Blocks may be nested. A copy of the model made inside the block
        stays as it is there.

    Raises:
        TypeError, ValueError: ``model`` is no module; a pattern matches no layer.

    Example:
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> with pause_statistics(layer):
        ...     y = layer(torch.randn(8, 3))
        >>> layer.num_batches_tracked.item(), layer.running_mean.tolist()
        (0, [0.0, 0.0, 0.0])
    """
    layers = with_running_moments(select("pause_statistics", model, where))
    with held_off(layers.values()):
        yield list(layers)


def with_running_moments(layers: dict[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Those of the layers that have running moments and update them, or would if nothing held them off."""
    return {
        path: layer
        for path, layer in layers.items()
        if layer.running_mean is not None and (layer.track_running_stats or layer in _held)
    }


@contextmanager
def held_off(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """The layers leave their running moments alone inside the block."""
    taken: list[_BatchNorm] = []
    try:
        for layer in layers:
            blocks, before = _held.get(layer, (0, layer.track_running_stats))
            layer.track_running_stats = False
            _held[layer] = blocks + 1, before
            taken.append(layer)
        yield
    finally:
        for layer in taken:
            blocks, before = _held[layer]
            if blocks > 1:
                _held[layer] = blocks - 1, before
            else:
                layer.track_running_stats = before
                del _held[layer]


def blocks_holding(layer: _BatchNorm) -> int:
    """How many blocks hold the layer off its running moments."""
    return _held.get(layer, (0, True))[0]
