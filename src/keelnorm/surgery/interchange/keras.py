"""Import batch norms from Keras and export them to it; Keras itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from keelnorm.nn.batch_norm import BatchNorm
from keelnorm.surgery.interchange.conventions import Convention, Count, export_layers, import_layers, leaves

KERAS = Convention("Keras", ("gamma", "beta", "moving_mean", "moving_variance"))


def from_keras(
    weights: Mapping[str, Any],
    *,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    count: Count = None,
    prefix: str | None = None,
) -> BatchNorm | dict[str, Tensor]:
    """Import the weights of Keras batch normalization as a layer, or as a state_dict.

    ``gamma, beta, moving_mean, moving_variance`` become ``weight, bias, running_mean, running_var``; torch's momentum
    is one minus Keras's. Keras averages biased variances, torch unbiased ones: with ``count`` n the variance is
    multiplied by n/(n − 1). Without it the variance stays, which is right for evaluation.

    Args:
        weights: One layer's ``{"gamma": array, ...}``, where gamma (``scale=False``) or beta (``center=False``) may be
            missing; or a model's weights by layers' names, nested or joined by "/" or ".", as
            ``{w.path: w.numpy() for w in model.weights}``. A ":0" at the end of a name is dropped. Layers without a
            moving mean or variance are ignored: their kernels have another layout. Values may be numpy's arrays,
            torch's tensors, or anything that numpy converts.
        epsilon: The layer's epsilon, with Keras's default. A state_dict does not hold it.
        momentum: The layer's momentum in Keras's sense, with Keras's default. A state_dict does not hold it.
        count: The number of values per channel in a training batch, or a dict of these by layers' paths, joined by ".".
        prefix: A path to put before a state_dict's keys. With one, a single layer gives a state_dict too.

    Returns:
        For one layer a ``kn.BatchNorm`` in training mode, without a weight or bias that Keras's does not have. For a
        model the state_dict of its batch norms, with missing weights as 1 and missing biases as 0; load it with
        ``strict=False``.

    Differs:
        Keras normalizes the last axis by default, torch axis 1: permute the input (N, *S, C) to (N, C, *S).

    Raises:
        TypeError: A value is no array of floating-point numbers, or a name is no string.
        ValueError: Names are unknown or missing, shapes differ, there is no batch norm, or an option is not legal.

    Example:
        >>> layer = from_keras({"beta": [0.5], "moving_mean": [2.0], "moving_variance": [4.0]}, epsilon=0.0)
        >>> layer.weight, layer.bias.tolist(), layer.running_var.tolist(), round(layer.momentum, 2)
        (None, [0.5], [4.0], 0.01)

    Source:
        keras.layers.BatchNormalization of Keras 3, whose update is ``moving_variance · momentum + variance ·
        (1 − momentum)`` with the batch's biased variance. tf.keras 2 on inputs of four dimensions ran a fused kernel
        that averages unbiased variances: give no ``count`` for these.
    """
    what = "from_keras"
    layers: dict[str, dict[str, Any]] = {}
    for (*path, name), value in leaves(what, weights).items():
        layers.setdefault(".".join(path), {})[name.removesuffix(":0")] = value
    if set(layers) != {""}:
        layers = {path: layer for path, layer in layers.items() if layer.keys() & KERAS.moments}
    if not layers:
        raise ValueError(f"{what}: no layer has {sorted(KERAS.moments)}; got {sorted(weights)}")
    read = {path: KERAS.read(what, path, layer, count) for path, layer in layers.items()}
    return import_layers(what, read, epsilon, momentum, prefix)


def to_keras(model: nn.Module, *, count: Count = None) -> dict[str, np.ndarray]:
    """Export a layer, or all batch norms of a model, as weights of Keras batch normalization.

    Args:
        model: A batch norm, or a model. It is not changed.
        count: The number n of values per channel in a training batch, or a dict of these by path: the variance is
            multiplied by (n − 1)/n. Without it the variance stays.

    Returns:
        ``{"gamma": array, ...}`` for a layer, ``{"path/to/gamma": array, ...}`` for a model; without gamma or beta
        if the layer has none (``scale=False``, ``center=False``). Keras's layer also needs ``epsilon=layer.eps`` and
        ``momentum=1 - layer.momentum``. bfloat16, which numpy lacks, becomes float32.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: There is no batch norm, or one has no running statistics or more state than Keras's.

    Example:
        >>> sorted(to_keras(BatchNorm(3)))
        ['beta', 'gamma', 'moving_mean', 'moving_variance']
    """
    layers = export_layers("to_keras", model, KERAS, count)
    return {"/".join((*path, name)): value for path, layer in layers.items() for name, value in layer.items()}
