"""Make a model ready for exporters: torch.nn's layers, in evaluation, with running statistics."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

from torch import nn

from keelnorm.control.layer_selection import named
from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.conversion.to_torch import make_plain
from keelnorm.surgery.known_layers import is_frozen
from keelnorm.surgery.report import Report
from keelnorm.surgery.target_layers import batch_norms_in, notes_on, refuse_sharded

Model = TypeVar("Model", bound=nn.Module)


def prepare_export(
    model: Model, *, training: Literal["refuse", "allow"] = "refuse", inplace: bool = False
) -> tuple[Model, Report]:
    """Make a model ready for exporters, quantizers and other tools that look for ``torch.nn``'s layers.

    Keelnorm's drop-in layers become ``torch.nn``'s of the same names, with the same parameters and buffers. The
    conversion by :func:`convert` is undone, and ``kn.Sequential`` becomes ``torch.nn.Sequential``. Keelnorm's other
    layers stay: in evaluation they consist of torch's own operators, which ``torch.export`` accepts.

    Args:
        model: Any module.
        training: What to do with layers that normalize with the batch, because they are in training mode or have no
            running statistics: "refuse" raises an error that names them all, "allow" notes them in the report.
        inplace: Whether to change the model itself; otherwise a copy.

    Returns:
        The model, and a report with a row for each batch norm.

    Raises:
        TypeError: ``model`` is no module, or is a ScriptModule or sharded.
        ValueError: Layers would normalize with the batch; a lazy layer does not know its channels yet, or a
            ``VirtualBatchNorm`` has no reference batch. The model is as before.

    Example:
        >>> import keelnorm as kn
        >>> model = kn.Sequential(nn.Conv2d(3, 8, 3), kn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> prepared, report = prepare_export(model)
        >>> type(prepared[1]) is nn.BatchNorm2d, type(prepared) is nn.Sequential, report.rows[0]["was"]
        (True, True, 'kn.BatchNorm2d')
    """
    if training not in ("refuse", "allow"):
        raise ValueError(f"prepare_export: training must be 'refuse' or 'allow'; got {describe(training)}")
    found = batch_norms_in("prepare_export", model)
    notes = {path: _normalizes_with_batch(layer) for path, layer in found.items()}
    unready = [f"{named(path)} {why}" for path, layer in found.items() if (why := _not_ready(layer))]
    if training == "refuse":
        unready += [f"{named(path)} {why}" for path, why in notes.items() if why]
    if unready:
        raise ValueError(
            f"prepare_export: {'; '.join(unready)}. Call model.eval(), give layers running statistics (kn.recalibrate "
            "sets them from data), or pass training='allow' to let them normalize with the batch; the model is as "
            "before"
        )
    if not inplace:
        refuse_sharded("prepare_export", model)
        model = copy.deepcopy(model)
    layers = batch_norms_in("prepare_export", model)
    rows = make_plain("prepare_export", model, layers)
    for row in rows:
        row["note"] = notes[row["path"]]
    changed = sum(row["was"] != row["is"] for row in rows)
    summary = {"batch norms": len(rows), "made plain": changed}
    return model, Report("prepare_export", summary, rows, notes_on(model))


def _normalizes_with_batch(layer: BatchNormBase) -> str | None:
    """Why a layer normalizes with the batch, in words that follow its path."""
    if layer.running_mean is None:
        return "has no running statistics"
    return "is in training mode" if layer.training and not is_frozen(layer) else None


def _not_ready(layer: BatchNormBase) -> str | None:
    """What a layer lacks to evaluate, in words that follow its path."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "does not know its channels yet: run the model once"
    return layer.unready() if isinstance(layer, Variant) else None
