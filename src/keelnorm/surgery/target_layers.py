"""Find the batch norms that an operation changes, and say which parts of a model it can't see or change."""

from __future__ import annotations

import torch
from torch import nn

from keelnorm.control.layer_selection import Where, named, select
from keelnorm.engine.error_messages import RefusedTypeError, shortened
from keelnorm.engine.torch_internals import BatchNormBase, InstanceNormBase
from keelnorm.surgery.known_layers import computes_as, is_norm

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def batch_norms_in(what: str, model: nn.Module, where: Where = None) -> dict[str, BatchNormBase]:
    """The batch norms of a model that ``where`` selects, those of registered classes included, by path.

    Raises:
        TypeError: ``model`` is no module or a ScriptModule, or ``where`` is of another type.
        ValueError: ``where`` selects no batch norm.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise RefusedTypeError(
            f"{what}: the model is a ScriptModule, whose layers can't be seen or changed; pass the model that it was "
            "made from, and script that afterwards"
        )
    return select(what, model, where, is_norm)


def refuse_sharded(what: str, model: nn.Module) -> None:
    """Raise if a part of a model is sharded: its parameters are pieces that are replaced after each forward."""
    for path, module in model.named_modules():
        if any(kind.__name__ in _SHARDED and kind.__module__.startswith("torch.") for kind in type(module).__mro__):
            raise RefusedTypeError(
                f"{what}: {path or 'the model'} is sharded (FSDP), so it can't be copied and its weights can't be "
                "replaced; pass the model before it is sharded, with the full state_dict"
            )


def notes_on(model: nn.Module) -> list[str]:
    """Sentences for a report about batch norms that can't be seen, or whose class is not known."""
    scripted: list[str] = []
    unknown: dict[type[nn.Module], list[str]] = {}
    for path, module in model.named_modules():
        path = named(path)
        if isinstance(module, torch.jit.ScriptModule):
            if not any(path.startswith(f"{outer}.") for outer in scripted):
                scripted.append(path)
        elif _has_running_statistics(module) and (not is_norm(module) or computes_as(type(module)) is None):
            unknown.setdefault(type(module), []).append(path)
    notes = [f"{path} is a ScriptModule: batch norms inside are not seen." for path in scripted]
    for kind, paths in unknown.items():
        notes.append(
            f"{shortened(paths, 3)}: {kind.__module__}.{kind.__qualname__} is not known, and may "
            f"compute more than a batch norm; kn.surgery.register({kind.__name__}, ...) says what it does."
        )
    return notes


def _has_running_statistics(module: nn.Module) -> bool:
    return {"running_mean", "running_var"} <= module._buffers.keys() and not isinstance(module, InstanceNormBase)
