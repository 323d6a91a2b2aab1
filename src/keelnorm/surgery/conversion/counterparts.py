"""The class that each batch norm gets when it is converted, and the change of a layer's class in place.

The layer stays the same object: its parameters, buffers, hooks, mode and name, and all references to it, stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from keelnorm import nn as layers
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.surgery.conversion.foreign_layers import Registered, twin_of
from keelnorm.surgery.known_layers import known, registration_mismatch

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
#: The drop-ins and torch.nn's classes.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in TWINS.items()}
_DROP_INS = (*TWINS, layers.BatchNorm, layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d, layers.SyncBatchNorm)
_SYNC = (nn.SyncBatchNorm, layers.SyncBatchNorm)
#: The attribute in which a converted layer keeps what it was.
_WAS = "_converted_from"


@dataclass(frozen=True)
class Target:
    """What a conversion does with a layer's class.

    Args:
        kind: The class that the layer gets; None if it keeps its own.
        refusal: Why the layer can't be converted, in words that follow its path; None if it can, or need not be.
    """

    kind: type[nn.Module] | None = None
    refusal: str | None = None


def target_of(layer: BatchNormBase, sync: bool | None) -> Target:
    """Decide which class a layer gets.

    Args:
        layer: Any batch norm.
        sync: Whether layers are to be synchronized; None leaves that as it is.
    """
    kind: Any = type(layer)
    registered = known(kind)
    if isinstance(layer, CountsSkipped | Registered) and kind not in _DROP_INS and (sync is None or registered is None):
        return Target()
    if kind not in _DROP_INS and registered is None:
        return Target(
            refusal=f"is a {kind.__name__}, which may have a forward or state of its own that would be lost. If it has "
            f"none, or only calls modules after the batch norm, kn.surgery.register({kind.__name__}, ...) says so"
        )
    if any(name in layer.__dict__ for name in ("forward", "__call__")):
        return Target(refusal="has a forward of its own")
    if nn.utils.parametrize.is_parametrized(layer):
        return Target(refusal="is parametrized")
    if registered is not None:
        if (mismatch := registration_mismatch(layer)) is not None:
            return Target(refusal=mismatch)
        if sync is not None and not registered.frozen and sync != issubclass(kind, _SYNC):
            verb = "synchronize" if sync else "unsynchronize"
            return Target(refusal=f"is a {kind.__name__}, which only its own package can {verb}")
        return Target() if isinstance(layer, Registered) else Target(twin_of(kind))
    if sync is True and kind not in _SYNC:
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            return Target(refusal="does not know its channels yet: run the model once first")
        return Target(layers.SyncBatchNorm)
    if sync is False and kind in _SYNC:
        was: Any = layer.__dict__.get(_WAS, (None,))[0] or layer.__dict__.get(layers.SyncBatchNorm.CAME_FROM)
        if was is None or was in _SYNC:  # the rank of its inputs is unknown
            return Target(layers.BatchNorm)
        return Target(TWINS.get(was) or was)
    return Target(TWINS.get(kind))


def change_class(layer: BatchNormBase, kind: type[nn.Module], process_group: Any) -> None:
    """Change a layer's class in place; :func:`change_back` undoes it."""
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
    """Whether :func:`change_class` has changed the layer's class."""
    return _WAS in layer.__dict__


def class_before(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer had before :func:`change_class`, or has if it was not changed."""
    return layer.__dict__[_WAS][0] if is_changed(layer) else type(layer)


def name_of(kind: type) -> str:
    """The name of a class in reports."""
    if issubclass(kind, Registered):
        return f"{kind.__name__} (keelnorm)"
    return f"kn.{kind.__name__}" if kind.__module__.partition(".")[0] == "keelnorm" else kind.__name__


def change_back(layer: nn.Module) -> None:
    """Undo :func:`change_class`."""
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
    """Remove the counts that :class:`CountsSkipped` adds to a layer."""
    layer.__dict__.pop("_updates", None)
