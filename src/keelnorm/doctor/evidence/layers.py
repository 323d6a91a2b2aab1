"""Facts about each batch norm of a model: its options, mode, parameters and running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from keelnorm.control.frozen_layer import has_frozen_statistics
from keelnorm.doctor.evidence.neighbors import Surroundings
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.engine.update_counts import SKIPPED
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.known_layers import is_frozen

_BUFFERS = ("running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What is known of one batch norm.

    Tensors are copies in float64 on the CPU, each None where the layer lacks it or it has no values yet.

    Args:
        path: Its path in the model.
        module: The layer.
        kind: Its class: "BatchNorm2d", or "kn.BatchNorm2d" for keelnorm's.
        training: Its mode.
        held: Whether ``kn.freeze`` keeps it in evaluation.
        fixed: Whether its class always normalizes with fixed statistics, as ``FrozenBatchNorm2d``.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        eps: What is added to the variance.
        tracks: Its option ``track_running_stats``.
        has_statistics: Whether it has a running mean and a running variance.
        weight: γ, (C,).
        bias: β, (C,).
        running_mean: The running mean; most layers have (C,).
        running_var: The running variance.
        batches: ``num_batches_tracked``: how many batches have updated the running statistics.
        skipped: ``skipped_updates`` of keelnorm's layers: per channel the updates left out because of NaN or Inf.
        trainable: Names of its parameters that require a gradient.
        frozen: Names of those that do not.
        dtypes: The dtypes of its parameters and running statistics, by name.
        own_scale: What a keelnorm variant keeps in ``running_var``, if that is not the variance of its input.
        beside: What stands before and after it; None where that is not known.
    """

    path: str
    module: nn.Module
    kind: str
    training: bool
    held: bool
    fixed: bool
    momentum: float | None
    eps: float
    tracks: bool
    has_statistics: bool
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: int | None
    skipped: Tensor | None
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    own_scale: str | None
    beside: Surroundings | None = None

    @property
    def is_variant(self) -> bool:
        """Whether it is a keelnorm variant, which normalizes in training in its own way."""
        return isinstance(self.module, Variant)

    @property
    def uses_batch(self) -> bool:
        """Whether the batch normalizes in the present mode, and not the running statistics."""
        return not self.fixed and (self.training or not self.has_statistics)

    @property
    def updates(self) -> bool:
        """Whether a forward in the present mode updates the running statistics."""
        return self.training and self.tracks and self.has_statistics and not self.fixed

    @property
    def is_initial(self) -> bool:
        """Whether the running statistics are those of a new layer: mean 0 and variance 1 in every channel."""
        if self.running_mean is None or self.running_var is None:
            return False
        return bool((self.running_mean == 0).all() and (self.running_var == 1).all())

    @property
    def code(self) -> str:
        """An expression that gives the layer."""
        return f"model.get_submodule({self.path!r})" if self.path else "model"

    @property
    def named(self) -> str:
        """The layer in a sentence."""
        return f"{self.kind} {self.path!r}" if self.path else self.kind


def counted(layers: int) -> str:
    """A number of layers in a sentence."""
    return f"{layers} batch norm{'s' * (layers != 1)}"


def facts_of(layers: Mapping[str, nn.Module], beside: Mapping[nn.Module, Surroundings]) -> tuple[LayerFacts, ...]:
    """The facts about layers by path: those that ``beside`` has in its order, then the others."""
    paths = {layer: path for path, layer in layers.items()}
    ordered = [layer for layer in beside if layer in paths]
    ordered += [layer for layer in layers.values() if layer not in beside]
    return tuple(_facts(paths[layer], layer, beside.get(layer)) for layer in ordered)


def _facts(path: str, layer: nn.Module, beside: Surroundings | None) -> LayerFacts:
    kind = type(layer)
    parameters = dict(layer.named_parameters())
    batches = _values(getattr(layer, "num_batches_tracked", None))
    buffers = {name: getattr(layer, name, None) for name in _BUFFERS}
    return LayerFacts(
        path=path,
        module=layer,
        kind=f"kn.{kind.__name__}" if kind.__module__.partition(".")[0] == "keelnorm" else kind.__name__,
        training=layer.training,
        held=isinstance(layer, BatchNormBase) and has_frozen_statistics(layer) and not layer.training,
        fixed=is_frozen(layer),
        momentum=getattr(layer, "momentum", None),
        eps=float(layer.eps),  # type: ignore[arg-type]
        tracks=bool(getattr(layer, "track_running_stats", True)),
        has_statistics=all(value is not None for value in buffers.values()),
        weight=_values(getattr(layer, "weight", None)),
        bias=_values(getattr(layer, "bias", None)),
        running_mean=_values(buffers["running_mean"]),
        running_var=_values(buffers["running_var"]),
        batches=None if batches is None or batches.numel() != 1 else int(batches),
        skipped=_skipped(layer),
        trainable=tuple(name for name, value in parameters.items() if value.requires_grad),
        frozen=tuple(name for name, value in parameters.items() if not value.requires_grad),
        dtypes={name: value.dtype for name, value in _tensors({**parameters, **buffers})},
        own_scale=layer.own_scale if isinstance(layer, Variant) else None,
        beside=beside,
    )


def plain_facts(layer: LayerFacts) -> dict[str, Any]:
    """Facts about a layer as plain values, for JSON and for the page."""
    return {
        "path": layer.path,
        "kind": layer.kind,
        "channels": next((v.shape[-1] for v in (layer.running_mean, layer.weight) if v is not None), None),
        "mode": "fixed" if layer.fixed else "frozen" if layer.held else "train" if layer.training else "eval",
        "momentum": layer.momentum,
        "eps": layer.eps,
        "batches": layer.batches,
        "before": [] if layer.beside is None else [one.name for one in layer.beside.before],
        "after": [] if layer.beside is None else [one.name for one in layer.beside.after],
    }


def _skipped(layer: nn.Module) -> Tensor | None:
    """The count of skipped updates, without making one where nothing has been counted."""
    counts = getattr(getattr(layer, "_updates", None), "tensor", None)
    return None if counts is None else _values(counts[SKIPPED])


def _tensors(named: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in named.items() if isinstance(value, Tensor))


def _values(given: Any) -> Tensor | None:
    """A copy in float64 on the CPU; None without values, as those of lazy layers and on the meta device."""
    if not isinstance(given, Tensor) or is_lazy(given) or given.is_meta or not given.numel():
        return None
    return given.detach().to("cpu", torch.float64, copy=True)
