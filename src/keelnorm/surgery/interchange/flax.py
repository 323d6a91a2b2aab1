"""Batch norms from Flax, and to it; without Flax."""

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
    """A layer, or a state_dict, of the variables of ``flax.linen.BatchNorm``.

    ``scale`` and ``bias`` of "params" become ``weight`` and ``bias``, ``mean`` and ``var`` of "batch_stats" become
    ``running_mean`` and ``running_var``; momentum is one minus Flax's. Flax averages biased variances, torch unbiased
    ones: with ``count`` n the variance is multiplied by n/(n − 1), without it is taken as it is, which is what
    evaluation needs.

    Args:
        variables: ``{"params": {...}, "batch_stats": {...}}`` of one layer or of a model, names nested or joined by "/"
            or ".". ``scale`` or ``bias`` may be missing. Other collections, and layers without batch_stats, are passed
            over. Numpy's arrays, torch's tensors, and what numpy makes an array of, such as JAX's arrays.
        epsilon, momentum: Of the layer, in Flax's sense, with Flax's defaults. A state_dict holds neither.
        count: Values per channel of a training batch, or a dict of these by layers' paths, joined by ".".
        prefix: A path to put before a state_dict's keys. With one, a single layer gives a state_dict too.

    Returns:
        For one layer an ``kn.BatchNorm``, in training mode, without a weight or bias that Flax's does not have. For a
        model the state_dict of its batch norms, missing weights as 1 and biases as 0, to be loaded with
        ``strict=False``.

    Differs:
        Flax normalizes the last axis unless told otherwise, torch axis 1: permute the input (N, *S, C) to (N, C, *S).

    Raises:
        TypeError, ValueError: names are unknown or missing, shapes differ, there is no batch norm, or an option is not
            legal.

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
    """The variables of ``flax.linen.BatchNorm``, of a layer or of all batch norms in a model: :func:`from_flax` undone.

    Args:
        model: A batch norm, or a model. It is not changed.
        count: Values per channel n of a training batch, or a dict of these by path: the variance is multiplied by
            (n − 1)/n. Without it is taken as it is.

    Returns:
        ``{"params": {...}, "batch_stats": {...}}``, nested by the parts of the layers' paths, of numpy arrays. Flax's
        layer also needs ``epsilon=layer.eps`` and ``momentum=1 - layer.momentum``, and ``use_scale=False`` or
        ``use_bias=False`` where the layer has no weight or bias. bfloat16, which numpy does not have, comes as float32.

    Raises:
        TypeError, ValueError: there is no batch norm, one has no running statistics, or has more than Flax's keeps.

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
