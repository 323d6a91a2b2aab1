"""Models made ready for exporters: plain layers, in evaluation, with statistics."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.layer_selection import named
from keelnorm.engine.error_messages import describe
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.conversion.counterparts import name_of
from keelnorm.surgery.conversion.to_torch import make_plain
from keelnorm.surgery.known_layers import is_frozen, notes_on
from keelnorm.surgery.report import Report
from keelnorm.surgery.target_layers import chosen, refuse_sharded

Model = TypeVar("Model", bound=nn.Module)


def prepare_export(
    model: Model, *, training: Literal["refuse", "allow"] = "refuse", inplace: bool = False
) -> tuple[Model, Report]:
    """Make a model ready for exporters, quantizers and other tools that look for ``torch.nn``'s layers.

    Keelnorm's drop-in layers become ``torch.nn``'s of the same names, with the same parameters and buffers, calls that
    :func:`convert` has fused are taken apart, and ``kn.Sequential`` becomes ``torch.nn.Sequential``. Keelnorm's other
    layers stay: in evaluation they are made of torch's own operators, which ``torch.export`` takes.

    Args:
        model: Any module.
        training: What layers in training mode, and layers without running statistics, which both normalize with
        whatever
            batch comes, are: "refuse" raises and names them all, before anything is changed; "allow" notes them.
        inplace: Change the model itself; otherwise a copy.

    Returns:
        The model, and a report with a row for each batch norm.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: layers would normalize with the batch; a lazy layer does not know its channels, or a
            ``VirtualBatchNorm`` has no reference. The model is as before.

    Example:
        >>> import keelnorm as kn
        >>> model = kn.Sequential(nn.Conv2d(3, 8, 3), kn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> prepared, report = prepare_export(model)
        >>> type(prepared[1]) is nn.BatchNorm2d, type(prepared) is nn.Sequential, report.rows[0]["was"]
        (True, True, 'kn.BatchNorm2d')
    """
    if training not in ("refuse", "allow"):
        raise ValueError(f"prepare_export: training must be 'refuse' or 'allow'; got {describe(training)}")
    found = chosen("prepare_export", model)
    notes = {path: _by_the_batch(layer) for path, layer in found.items()}
    unready = [f"{named(path)} {why}" for path, layer in found.items() if (why := _not_ready(layer))]
    if training == "refuse":
        unready += [f"{named(path)} {why}" for path, why in notes.items() if why]
    if unready:
        raise ValueError(
            f"prepare_export: {'; '.join(unready)}. Call model.eval(), give layers running statistics (kn.recalibrate "
            "sets them from data), or allow what normalizes with the batch by training='allow'; the model is as before"
        )
    if not inplace:
        refuse_sharded("prepare_export", model)
        model = copy.deepcopy(model)
    kinds = {path: type(layer) for path, layer in chosen("prepare_export", model).items()}
    with ExitStack() as undo:
        make_plain("prepare_export", model, undo)
        undo.pop_all()
    rows: list[dict[str, Any]] = []
    for path, layer in chosen("prepare_export", model).items():
        is_now = type(layer)
        rows.append({"path": path, "was": name_of(kinds[path]), "is": name_of(is_now), "note": notes[path]})
    changed = sum(row["was"] != row["is"] for row in rows)
    summary = {"batch norms": len(rows), "made plain": changed}
    return model, Report("prepare_export", summary, rows, notes_on(model))


def _by_the_batch(layer: _BatchNorm) -> str | None:
    """Why a layer normalizes with the batch, in words that follow its path."""
    if layer.running_mean is None:
        return "has no running statistics"
    return "is in training mode" if layer.training and not is_frozen(layer) else None


def _not_ready(layer: _BatchNorm) -> str | None:
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "does not know its channels yet: run the model once"
    return layer.unready() if isinstance(layer, Variant) else None
