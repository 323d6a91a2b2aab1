"""Which of keelnorm's layers stands in for which batch norm, and how a layer changes its class in place.

The layer stays the same object: parameters, buffers, hooks, mode, name and every reference to it are what they were.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm import nn as layers
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.surgery.conversion.foreign_layers import Registered, twin_of
from keelnorm.surgery.known_layers import known, misfit

#: Why a layer of ours keeps its class.
ALREADY = "is keelnorm's already"
#: torch.nn's classes and their drop-ins.
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.SyncBatchNorm: layers.SyncBatchNorm,
    nn.LazyBatchNorm1d: layers.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: layers.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: layers.LazyBatchNorm3d,
}
#: And back.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in TWINS.items()}
_DROP_INS = (*TWINS, layers.BatchNorm, layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d, layers.SyncBatchNorm)
_SYNC = (nn.SyncBatchNorm, layers.SyncBatchNorm)
#: Where a converted layer remembers what it was.
_WAS = "_converted_from"


def target_of(layer: _BatchNorm, sync: bool | None) -> type[nn.Module] | str:
    """The class that a layer gets, or why it keeps its own.

    Args:
        sync: Whether layers are to be synchronized; None leaves that as it is.
    """
    kind: Any = type(layer)
    registered = known(kind)
    if isinstance(layer, CountsSkipped | Registered) and kind not in _DROP_INS and (sync is None or registered is None):
        return ALREADY
    if kind not in _DROP_INS and registered is None:
        return (
            f"is a {kind.__name__}, whose own forward or state an keelnorm layer would not have. If it has neither, or "
            f"only modules that it calls behind the batch norm, kn.surgery.register({kind.__name__}, ...) says so"
        )
    if any(name in layer.__dict__ for name in ("forward", "__call__")):
        return "has a forward of its own"
    if nn.utils.parametrize.is_parametrized(layer):
        return "is parametrized"
    if registered is not None:
        if (reason := misfit(layer)) is not None:
            return reason
        if sync is not None and not registered.frozen and sync != issubclass(kind, _SYNC):
            return f"is a {kind.__name__}, which only its own package can {'' if sync else 'un'}synchronize"
        return ALREADY if isinstance(layer, Registered) else twin_of(kind)
    lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    if sync is True and kind not in _SYNC:
        return "does not know its channels yet: run the model once first" if lazy else layers.SyncBatchNorm
    if sync is False and kind in _SYNC:
        was: Any = layer.__dict__.get(_WAS, (None,))[0] or layer.__dict__.get(layers.SyncBatchNorm.CAME_FROM)
        if was is None or was in _SYNC:  # nothing says for which rank it was
            return layers.BatchNorm
        return TWINS.get(was) or was  # type: ignore[no-any-return]
    return TWINS.get(kind) or ALREADY


def change_class(layer: _BatchNorm, kind: type[nn.Module], process_group: Any) -> None:
    """Make a layer one of another class; :func:`change_back` undoes it."""
    attributes = layer.__dict__
    counted, grouped = "_updates" in attributes, "process_group" in attributes
    group = attributes.get("process_group")
    attributes.setdefault(_WAS, (type(layer), counted, (group,) if grouped else None))
    if kind is layers.SyncBatchNorm:
        attributes["process_group"] = group if process_group is None else process_group
    layer.__class__ = kind  # type: ignore[assignment]
    if isinstance(layer, CountsSkipped) and not counted:
        layer.count_skipped()


def is_changed(layer: nn.Module) -> bool:
    return _WAS in layer.__dict__


def class_before(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer has, or had before :func:`change_class`."""
    return layer.__dict__[_WAS][0] if is_changed(layer) else type(layer)  # type: ignore[no-any-return]


def name_of(kind: type) -> str:
    """A class as reports say it."""
    if issubclass(kind, Registered):
        return f"{kind.__name__} (keelnorm)"
    return f"kn.{kind.__name__}" if kind.__module__.partition(".")[0] == "keelnorm" else kind.__name__


def change_back(layer: nn.Module) -> None:
    kind, counted, group = layer.__dict__.pop(_WAS)
    if issubclass(kind, nn.modules.lazy.LazyModuleMixin) and not isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        kind = kind.cls_to_become  # it has learned its channels since
    layer.__class__ = kind
    if not counted:
        stop_counting(layer)
    layer.__dict__.pop("process_group", None)
    if group is not None:
        layer.__dict__["process_group"] = group[0]


def stop_counting(layer: nn.Module) -> None:
    """Take away what :class:`CountsSkipped` adds to a layer."""
    layer.__dict__.pop("_updates", None)
