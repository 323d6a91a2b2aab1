"""Keelnorm's batch norms in a model of someone else's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.layer_selection import Where
from keelnorm.engine.activations import NONE
from keelnorm.engine.fusion.expectations import ATTRIBUTE, Memory
from keelnorm.engine.fusion.scope import add_scope, has_scope, remove_scope
from keelnorm.nn._shared.variant import Variant
from keelnorm.nn.batch_norm import FusedBatchNorm
from keelnorm.surgery.conversion.counterparts import ALREADY, change_back, change_class, is_changed, name_of, target_of
from keelnorm.surgery.conversion.foreign_layers import Registered
from keelnorm.surgery.known_layers import is_norm, notes_on
from keelnorm.surgery.report import Report
from keelnorm.surgery.target_layers import chosen

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    *,
    fuse: bool = True,
    sync: bool | None = None,
    where: Where = None,
    process_group: Any = None,
) -> tuple[Model, Report]:
    """Make every batch norm of a model keelnorm's, in place, and let it run with the addition and activation behind it.

    A layer changes its class and stays the same object: parameters (an optimizer that has them keeps working), buffers,
    mode, hooks, name and state_dict keys are what they were. The model's own code runs on every call, unchanged. With
    ``fuse``, a layer learns from its first call what is done with its result: an activation, an addition, or both. From
    then on its result waits for that, and one kernel computes all of it. Whatever else is done with the result, by
    whatever code, sees what ``torch.nn``'s layers would have computed; the statistics are taken when the layer is
    called. Nothing waits outside a call of ``model`` or of one of its children that has layers in it.

    Args:
        model: Any module, a batch norm included. It is changed.
        fuse: Whether results may wait for what follows; else layers change their class alone.
        sync: True makes all layers ``kn.SyncBatchNorm``, False makes synchronized ones plain; None keeps what they are.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all. The results
            of others never wait.
        process_group: Of the synchronized layers; None keeps theirs, or means all ranks.

    Returns:
        The model itself, and a report: a row for each batch norm, with its class before and after, what runs together
        with it, and why nothing does, where that is so. The report follows the model: what runs together shows in it
        once the model has been called in a mode, and is done from the second call on.

    State:
        ``skipped_updates`` is added to the layers; it is in no state_dict. :func:`revert` undoes all of it.

    Differs:
        While a result waits it is a ``torch.Tensor`` of a subclass: code in the model that asks for
        ``type(y) is torch.Tensor`` right behind a batch norm sees that. ``fuse=False`` or ``where`` avoid it.

    Raises:
        TypeError, ValueError: ``model`` is no module, or a pattern matches no layer. The model is then as before.
        RuntimeError: from a call of the model, if a layer's input is changed in place before a waiting result is used,
            which in all calls before was not so; the next call computes that result at once.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model, report = convert(model)
        >>> y = model(torch.randn(8, 3, 64, 64))
        >>> type(model[1]).__module__, report.rows[0]["runs with"]
        ('keelnorm.nn.batch_norm', 'relu')
    """
    changes = {path: _Change(layer, target_of(layer, sync)) for path, layer in chosen("convert", model, where).items()}
    with ExitStack() as undo:
        for change in changes.values():
            layer = change.layer
            undo.callback(restore, layer, layer.__class__, dict(vars(layer)), dict(layer._buffers))
            if isinstance(change.target, type):
                change_class(layer, change.target, process_group)
            if not fuse:
                vars(layer).pop(ATTRIBUTE, None)
            elif isinstance(layer, FusedBatchNorm | Variant | Registered):
                vars(layer).setdefault(ATTRIBUTE, Memory())
        for module in _callers(model) if fuse else ():
            if not has_scope(module):
                undo.callback(remove_scope, module)
                add_scope(module)
        undo.pop_all()
    live = _Rows(changes)
    return model, Report("convert", _Summary(changes, live), live, notes_on(model))


def revert(model: Model) -> tuple[Model, Report]:
    """Undo :func:`convert`: layers have their classes again, and no result waits any more.

    What training and loading have changed since, stays: parameters and buffers are the same objects. Keelnorm's layers
    that were not converted stay too. Works on copies and on loaded models.

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
    layers = chosen("revert", model)
    kinds = {path: name_of(type(layer)) for path, layer in layers.items() if is_changed(layer)}
    with ExitStack() as undo:
        take_back(model, undo)
        undo.pop_all()
    rows = [{"path": path, "was": was, "is": name_of(type(layers[path]))} for path, was in kinds.items()]
    return model, Report("revert", {"layers": len(rows)}, rows)


def take_back(model: nn.Module, undo: ExitStack) -> None:
    """Undo what convert did to a model, in a way that ``undo`` undoes."""
    for module in model.modules():
        if is_changed(module) or ATTRIBUTE in vars(module):
            undo.callback(restore, module, module.__class__, dict(vars(module)), dict(module._buffers))
            vars(module).pop(ATTRIBUTE, None)
            if is_changed(module):
                change_back(module)
        if has_scope(module):
            undo.callback(add_scope, module)
            remove_scope(module)


def _callers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules within whose calls results may wait: the model, and those of its children that have layers inside.

    The latter for those who call parts of a model by themselves, as trainers do.
    """
    for module in (model, *model.children()):
        if not is_norm(module) and any(ATTRIBUTE in vars(part) for part in module.modules()):
            yield module


class _Change:
    """What became of one layer."""

    def __init__(self, layer: _BatchNorm, target: type[nn.Module] | str) -> None:
        self.layer, self.target = layer, target
        self.was = name_of(type(layer))

    @property
    def memory(self) -> Memory | None:
        return vars(self.layer).get(ATTRIBUTE)

    @property
    def refusal(self) -> str | None:
        """Why the layer was left alone."""
        return self.target if isinstance(self.target, str) and self.target != ALREADY else None

    def row(self, path: str) -> dict[str, Any]:
        memory = self.memory
        return {
            "path": path,
            "was": self.was,
            "is": name_of(type(self.layer)),
            "runs with": _words(memory) if memory else None,
            "reason": self.refusal or (memory.reason() if memory else None),
        }


# A report that follows the model: what runs together is known when it has run.


class _Rows(Sequence[dict[str, Any]]):
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
    def __init__(self, changes: Mapping[str, _Change], rows: _Rows) -> None:
        self._values: dict[str, Callable[[], int]] = {
            "batch norms": lambda: len(changes),
            "converted": lambda: sum(isinstance(change.target, type) for change in changes.values()),
            "fused": lambda: sum(row["runs with"] is not None for row in rows),
            "left with a reason": lambda: sum(change.refusal is not None for change in changes.values()),
        }

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, name: str) -> int:
        return self._values[name]()


def _words(memory: Memory) -> str | None:
    """What runs together with a layer: "relu", "addition and relu"; None where nothing does."""
    found = [
        ["addition"] * kernel.residual + [kernel.activation.name] * (kernel.activation.code != NONE.code)
        for kernel in memory.kernels()
    ]
    return " or ".join(dict.fromkeys(" and ".join(parts) for parts in found)) or None


def restore(layer: nn.Module, kind: type, attributes: dict[str, Any], buffers: dict[str, Any]) -> None:
    layer.__class__ = kind
    vars(layer).clear()
    vars(layer).update(attributes)
    layer._buffers.clear()
    layer._buffers.update(buffers)
