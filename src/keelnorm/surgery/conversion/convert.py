"""Convert a model's batch norms to keelnorm's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

from torch import nn

from keelnorm.control.layer_selection import Where
from keelnorm.engine.activations import NONE
from keelnorm.engine.fusion.expectations import ATTRIBUTE, Memory
from keelnorm.engine.fusion.scope import add_scope, remove_scope
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn._shared.variant import Variant
from keelnorm.nn.batch_norm import FusedBatchNorm
from keelnorm.surgery.conversion.counterparts import (
    Target,
    change_back,
    change_class,
    is_changed,
    name_of,
    target_of,
)
from keelnorm.surgery.conversion.foreign_layers import Registered
from keelnorm.surgery.known_layers import is_norm
from keelnorm.surgery.report import Report
from keelnorm.surgery.snapshot import all_or_nothing
from keelnorm.surgery.target_layers import batch_norms_in, notes_on

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    *,
    fuse: bool = True,
    sync: bool | None = None,
    where: Where = None,
    process_group: Any = None,
) -> tuple[Model, Report]:
    """Convert a model's batch norms to keelnorm's, in place, and fuse each with the operations that follow it.

    A layer changes its class and stays the same object: its parameters (an optimizer keeps working), buffers, mode,
    hooks, name and state_dict keys stay. The model's own code runs on every call, unchanged. With ``fuse``, a layer
    learns from its first call what is done with its result: an activation, an addition, or both. From then on its
    result waits for that operation, and one kernel computes all of it. Any other code that uses the result sees what
    ``torch.nn``'s layer would have computed. Statistics are taken when the layer is called. Results wait only inside a
    call of ``model``, or of one of its children that contains layers.

    Args:
        model: Any module, also a batch norm itself. It is changed.
        fuse: Whether results may wait for the operation that follows; if not, only classes change.
        sync: True makes all layers ``kn.SyncBatchNorm``, False makes synchronized layers plain; None changes neither.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all. The results
            of other layers never wait.
        process_group: The group of the synchronized layers; None keeps theirs, or takes all ranks.

    Returns:
        The model itself, and a report with a row for each batch norm: its class before and after, what runs together
        with it, or the reason why nothing does. The report follows the model: once the model has been called in a mode,
        it shows what runs together from the second call on.

    State:
        ``skipped_updates`` is added to the layers; it is in no state_dict. :func:`revert` undoes all of it.

    Differs:
        While a result waits it is of a subclass of ``torch.Tensor``. Code in the model that checks
        ``type(y) is torch.Tensor`` right after a batch norm notices that; ``fuse=False`` or ``where`` avoids it.

    Raises:
        TypeError: ``model`` is no module. It is then as before, as after any error.
        ValueError: A pattern matches no layer.
        RuntimeError: From a later call of the model: a layer's input was changed in place before the waiting result was
            used, which had not happened in earlier calls. The next call computes that result at once.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model, report = convert(model)
        >>> y = model(torch.randn(8, 3, 64, 64))
        >>> type(model[1]).__module__, report.rows[0]["runs with"]
        ('keelnorm.nn.batch_norm', 'relu')
    """
    found = batch_norms_in("convert", model, where)
    changes = {path: _Change(layer, target_of(layer, sync)) for path, layer in found.items()}
    with all_or_nothing(model.modules()):
        for change in changes.values():
            layer = change.layer
            if change.target.kind is not None:
                change_class(layer, change.target.kind, process_group)
            if not fuse:
                vars(layer).pop(ATTRIBUTE, None)
            elif isinstance(layer, FusedBatchNorm | Variant | Registered):
                vars(layer).setdefault(ATTRIBUTE, Memory())
        for module in _callers(model) if fuse else ():
            add_scope(module)
    rows = _Rows(changes)
    return model, Report("convert", _Summary(changes, rows), rows, notes_on(model))


def revert(model: Model) -> tuple[Model, Report]:
    """Undo :func:`convert`: give layers their former classes, and let no result wait.

    Parameters and buffers are the same objects, so what was trained or loaded since stays. Keelnorm's layers that were
    not converted stay too. Works on copies and on loaded models.

    Args:
        model: A model that was converted, or any other.

    Returns:
        The model itself, and a report with a row for each layer that was changed back.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        >>> model, _ = revert(convert(model)[0])
        >>> type(model[0]) is nn.BatchNorm1d
        True
    """
    layers = batch_norms_in("revert", model)
    kinds = {path: name_of(type(layer)) for path, layer in layers.items() if is_changed(layer)}
    with all_or_nothing(model.modules()):
        undo_conversion(model)
    rows = [{"path": path, "was": was, "is": name_of(type(layers[path]))} for path, was in kinds.items()]
    return model, Report("revert", {"layers": len(rows)}, rows)


def undo_conversion(model: nn.Module) -> None:
    """Undo what convert did to a model."""
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)
        if is_changed(module):
            change_back(module)
        remove_scope(module)


def _callers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules inside whose calls results may wait: the model, and its children that contain layers.

    The children are included because trainers may call parts of a model on their own.
    """
    for module in (model, *model.children()):
        if not is_norm(module) and any(ATTRIBUTE in vars(part) for part in module.modules()):
            yield module


class _Change:
    """What was done to one layer."""

    def __init__(self, layer: BatchNormBase, target: Target) -> None:
        self.layer, self.target = layer, target
        self.was = name_of(type(layer))

    def row(self, path: str) -> dict[str, Any]:
        """The report's row, as the layer is now."""
        memory: Memory | None = vars(self.layer).get(ATTRIBUTE)
        return {
            "path": path,
            "was": self.was,
            "is": name_of(type(self.layer)),
            "runs with": _words(memory) if memory else None,
            "reason": self.target.refusal or (memory.reason() if memory else None),
        }


class _Rows(Sequence[dict[str, Any]]):
    """The rows of a report that follows the model: which operations are fused is known after its first calls."""

    def __init__(self, changes: Mapping[str, _Change]) -> None:
        self._changes = changes

    def __len__(self) -> int:
        return len(self._changes)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return [change.row(path) for path, change in self._changes.items()][index]


class _Summary(Mapping[str, Any]):
    """The summary of a report that follows the model."""

    def __init__(self, changes: Mapping[str, _Change], rows: _Rows) -> None:
        self._saved_values: dict[str, Callable[[], int]] = {
            "batch norms": lambda: len(changes),
            "converted": lambda: sum(change.target.kind is not None for change in changes.values()),
            "fused": lambda: sum(row["runs with"] is not None for row in rows),
            "left with a reason": lambda: sum(change.target.refusal is not None for change in changes.values()),
        }

    def __len__(self) -> int:
        return len(self._saved_values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved_values)

    def __getitem__(self, name: str) -> int:
        return self._saved_values[name]()


def _words(memory: Memory) -> str | None:
    """The operations fused with a layer, such as "relu" or "addition and relu"; None for none."""
    found = [
        ["addition"] * kernel.residual + [kernel.activation.name] * (kernel.activation.code != NONE.code)
        for kernel in memory.kernels()
    ]
    return " or ".join(dict.fromkeys(" and ".join(parts) for parts in found)) or None
