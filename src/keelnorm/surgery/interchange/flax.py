"""Import batch norms from Flax and export them to it; Flax itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from keelnorm.nn.batch_norm import BatchNorm
from keelnorm.surgery.interchange.conventions import Convention, Count, export_layers, import_layers, leaves

FLAX = Convention("Flax", ("scale", "bias", "mean", "var"))
_PARAMS, _STATS = "params", "batch_stats"


def from_flax(
    variables: Mapping[str, Any],
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.99,
    count: Count = None,
    prefix: str | None = None,
) -> BatchNorm | dict[str, Tensor]:
    """Import the variables of ``flax.linen.BatchNorm`` as a layer, or as a state_dict.

    ``scale`` and ``bias`` of "params" become ``weight`` and ``bias``, ``mean`` and ``var`` of "batch_stats" become
    ``running_mean`` and ``running_var``; torch's momentum is one minus Flax's. Flax averages biased variances, torch
    unbiased ones: with ``count`` n the variance is multiplied by n/(n − 1). Without it the variance stays, which is
    right for evaluation.

    Args:
        variables: ``{"params": {...}, "batch_stats": {...}}`` of one layer or of a model, names nested or joined by "/"
            or ".". ``scale`` or ``bias`` may be missing. Other collections, and layers without batch_stats, are
            ignored. Values may be numpy's arrays, torch's tensors, or anything that numpy converts, as JAX's arrays.
        epsilon: The layer's epsilon, with Flax's default. A state_dict does not hold it.
        momentum: The layer's momentum in Flax's sense, with Flax's default. A state_dict does not hold it.
        count: The number of values per channel in a training batch, or a dict of these by layers' paths, joined by ".".
        prefix: A path to put before a state_dict's keys. With one, a single layer gives a state_dict too.

    Returns:
        For one layer a ``kn.BatchNorm`` in training mode, without a weight or bias that Flax's does not have. For a
        model the state_dict of its batch norms, with missing weights as 1 and missing biases as 0; load it with
        ``strict=False``.

    Differs:
        Flax normalizes the last axis by default, torch axis 1: permute the input (N, *S, C) to (N, C, *S).

    Raises:
        TypeError: A value is no array of floating-point numbers, or a name is no string.
        ValueError: Names are unknown or missing, shapes differ, there is no batch norm, or an option is not legal.

    Example:
        >>> stats = {"BatchNorm_0": {"mean": [2.0], "var": [4.0]}}
        >>> state = from_flax({"params": {"BatchNorm_0": {"scale": [3.0], "bias": [0.0]}}, "batch_stats": stats})
        >>> state["BatchNorm_0.weight"], state["BatchNorm_0.running_var"]
        (tensor([3.], dtype=torch.float64), tensor([4.], dtype=torch.float64))

    Source:
        flax.linen.BatchNorm, whose update is ``momentum · ra_var + (1 − momentum) · var`` with the batch's biased
        variance.
    """
    what = "from_flax"
    layers: dict[str, dict[str, Any]] = {}
    scales: dict[str, dict[str, Any]] = {}
    for (collection, *path), value in leaves(what, variables).items():
        if collection in (_PARAMS, _STATS) and path:
            into = layers if collection == _STATS else scales
            into.setdefault(".".join(path[:-1]), {})[path[-1]] = value
    layers = {path: stats for path, stats in layers.items() if stats.keys() & FLAX.moments}
    if not layers:
        raise ValueError(
            f"{what}: needs the collections {_PARAMS!r} and {_STATS!r}, with 'mean' and 'var' of a batch norm in the "
            f"second; got {sorted(variables)}"
        )
    read = {path: FLAX.read(what, path, stats | scales.get(path, {}), count) for path, stats in layers.items()}
    return import_layers(what, read, epsilon, momentum, prefix)


def to_flax(model: nn.Module, *, count: Count = None) -> dict[str, Any]:
    """Export a layer, or all batch norms of a model, as variables of ``flax.linen.BatchNorm``.

    Args:
        model: A batch norm, or a model. It is not changed.
        count: The number n of values per channel in a training batch, or a dict of these by path: the variance is
            multiplied by (n − 1)/n. Without it the variance stays.

    Returns:
        ``{"params": {...}, "batch_stats": {...}}``, nested by the parts of the layers' paths, of numpy arrays. Flax's
        layer also needs ``epsilon=layer.eps`` and ``momentum=1 - layer.momentum``, and ``use_scale=False`` or
        ``use_bias=False`` if the layer has no weight or bias. bfloat16, which numpy lacks, becomes float32.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: There is no batch norm, or one has no running statistics or more state than Flax's.

    Example:
        >>> variables = to_flax(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        >>> variables["batch_stats"]["1"]["mean"].tolist()
        [0.0, 0.0, 0.0]
    """
    variables: dict[str, Any] = {_PARAMS: {}, _STATS: {}}
    for path, layer in export_layers("to_flax", model, FLAX, count).items():
        for name, value in layer.items():
            tree = variables[_STATS if name in FLAX.moments else _PARAMS]
            for part in path:
                tree = tree.setdefault(part, {})
            tree[name] = value
    return variables
