"""Conversion of a model's batch normalizations to synchronized ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import Module

from keelnorm.engine.activations import is_untouched
from keelnorm.engine.error_messages import check_module
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn._shared.replace_layers import replace_layers
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.nn.batch_norm import FusedBatchNorm
from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Layers whose forward is that of plain batch normalization.
_PLAIN = (BatchNormBase, torch.nn.SyncBatchNorm, FusedBatchNorm, SyncBatchNorm)


def convert_sync(kind: type[SyncBatchNorm], module: Module, process_group: ProcessGroup | None) -> Module:
    """Do what :meth:`SyncBatchNorm.convert_sync_batchnorm` says, with layers of the class ``kind``."""
    check_module("convert_sync_batchnorm", module)
    layers = {layer: name for name, layer in module.named_modules() if isinstance(layer, BatchNormBase)}
    for layer, name in layers.items():
        _check_convertible(layer, name)
    return replace_layers(module, {layer: _synchronized(kind, layer, process_group) for layer in layers})


def _check_convertible(layer: BatchNormBase, name: str) -> None:
    """Raise a ValueError if a synchronized layer would compute something else."""
    if not any(type(layer).forward is plain.forward for plain in _PLAIN):
        reason = "has a forward of its own"
    elif not is_untouched(layer.__dict__) or layer._modules:
        reason = "has hooks, parametrizations or a forward of its own"
    elif isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
        reason = "doesn't know its channels yet; run the model once first"
    else:
        return
    raise ValueError(
        f"convert_sync_batchnorm: {name!r}, a {type(layer).__name__}, {reason}, which a synchronized layer would "
        "not have; replace it by hand, or convert the parts of the model without it"
    )


def _synchronized(kind: type[SyncBatchNorm], layer: BatchNormBase, process_group: ProcessGroup | None) -> SyncBatchNorm:
    """A synchronized layer with the layer's parameters, buffers, options and mode."""
    new = kind(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, process_group,
        device="meta", too_few=getattr(layer, "too_few", "error"),
    )  # fmt: skip
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(layer, name))
    if isinstance(layer, CountsSkipped):
        new._updates = layer._updates
    new._place_counts()
    vars(new)[kind.CAME_FROM] = vars(layer).get(kind.CAME_FROM, type(layer))
    return new.train(layer.training)
