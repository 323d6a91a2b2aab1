"""Which layers of a model the operations here are about, and what of a model they can't reach."""

from __future__ import annotations

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.layer_selection import Where, select
from keelnorm.surgery.known_layers import is_norm

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def chosen(what: str, model: Module, where: Where = None) -> dict[str, _BatchNorm]:
    """The batch norms of a model that are meant, those of registered classes too, by their paths.

    Raises:
        TypeError, ValueError: as :func:`keelnorm.control.layer_selection.select`; or the model is a ScriptModule.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{what}: the model is a ScriptModule, whose layers can't be seen or changed; take the model that it was "
            "made from, and script that afterwards"
        )
    return select(what, model, where, is_norm)


def refuse_sharded(what: str, model: Module) -> None:
    """Raise if parts of a model are sharded, where parameters are pieces that come back after each forward."""
    for path, module in model.named_modules():
        if any(kind.__name__ in _SHARDED and kind.__module__.startswith("torch.") for kind in type(module).__mro__):
            raise TypeError(
                f"{what}: {path or 'the model'} is sharded (FSDP), so that it can't be copied and its weights can't be "
                "replaced; take the model before it is sharded, with the full state_dict"
            )
