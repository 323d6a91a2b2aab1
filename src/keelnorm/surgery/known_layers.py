"""The registry of other packages' batch norm classes: which are known, and what their layers compute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase, NormBase

Kind = TypeVar("Kind", bound=type[nn.Module])


class Known(NamedTuple):
    """What the layers of one class compute; see :func:`register`."""

    then: tuple[str, ...] = ()
    frozen: bool = False
    #: Whether a layer may lack the modules that ``then`` names.
    then_optional: bool = False


#: The attribute of a class made by kn.convert that holds the known class it is derived from.
ORIGIN = "_registered"
_known: dict[type[nn.Module], Known] = {}
_ACT = ("drop", "act")
#: Other packages' classes, by module. Only modules that are loaded are looked at; nothing is imported.
_PACKAGES: dict[str, dict[str, Known]] = {
    "torchvision.ops.misc": {"FrozenBatchNorm2d": Known(frozen=True)},
    "detectron2.layers.batch_norm": {"FrozenBatchNorm2d": Known(frozen=True)},
    "timm.layers.norm_act": {
        "BatchNormAct2d": Known(_ACT),
        "SyncBatchNormAct": Known(_ACT, then_optional=True),
        "FrozenBatchNorm2d": Known(frozen=True),
        "FrozenBatchNormAct2d": Known(_ACT, frozen=True),
    },
}
#: A class that defines one of these changes what its base computes; one that defines only a constructor does not.
_COMPUTING = frozenset(
    ("forward", "__call__", "compute", "normalize_batch", "normalize_running", "normalization", "uses_batch")
)


def register(kind: Kind, *, then: Sequence[str] = (), frozen: bool = False) -> Kind:
    """Register what a class of batch norms computes, so that ``kn.convert``, ``kn.fold`` and others accept its layers.

    A layer whose class is exactly ``kind`` computes the batch norm of ``torch.nn`` that ``kind`` is derived from, with
    the same state and options, and then calls those of its own modules that ``then`` names:

        y = then_n(… then_1(bn(x)))

    torchvision's and detectron2's ``FrozenBatchNorm2d`` and timm's ``BatchNormAct2d``, ``SyncBatchNormAct``,
    ``FrozenBatchNorm2d`` and ``FrozenBatchNormAct2d`` are known without this.

    Args:
        kind: The class, derived from a batch norm of ``torch.nn``, or any module if ``frozen``.
        then: Names of attributes, each a module or None, in the order in which they are called.
        frozen: Whether the layer normalizes with ``running_mean`` and ``running_var`` in training too. These,
            ``weight`` and ``bias`` are then tensors of shape (C,), and ``eps`` is a number.

    Returns:
        ``kind``, so that ``@kn.surgery.register`` can decorate a class without ``then``.

    Raises:
        TypeError: ``kind`` is no class of modules, or ``then`` is no list of names.
        ValueError: ``kind`` is ``torch.nn``'s or keelnorm's own, or is not derived from a batch norm of ``torch.nn``.

    Example:
        >>> import keelnorm as kn
        >>> Named = type("Named", (nn.BatchNorm2d,), {"__module__": "mine"})  # a class of yours
        >>> _ = kn.surgery.register(Named)
        >>> kn.convert(nn.Sequential(Named(3)))[1].summary["converted"]
        1
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"register: kind must be a class of torch.nn.Module; got {describe(kind)}")
    if _is_own(kind):
        raise ValueError(
            f"register: {kind.__name__} is torch.nn's or keelnorm's own class, which needs no registration"
        )
    if not frozen and not issubclass(kind, BatchNormBase):
        raise ValueError(
            f"register: {kind.__name__} must be derived from a batch norm of torch.nn, which says what it computes. If "
            "it normalizes with fixed statistics in training too, pass frozen=True"
        )
    if isinstance(then, str) or not all(isinstance(name, str) for name in then):
        raise TypeError(f"register: then must be a list of names of modules; got {describe(then)}")
    _known[kind] = Known(tuple(then), bool(frozen))
    return kind


def known(kind: type[Any]) -> Known | None:
    """What is registered for exactly this class; None for nothing, and for torch.nn's and keelnorm's own."""
    kind = vars(kind).get(ORIGIN, kind)
    found = _known.get(kind)
    if found is None:
        found = _PACKAGES.get(kind.__module__, {}).get(kind.__name__)
        if found is not None and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind:
            return None  # another class of the same name
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm: derived from torch.nn's, or of a known class."""
    return isinstance(module, BatchNormBase) or known(type(module)) is not None


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer's class always normalizes with fixed statistics."""
    found = known(type(layer))
    return found is not None and found.frozen


def computes_as(kind: type[Any]) -> type[Any] | None:
    """The nearest class in the MRO that is torch.nn's, keelnorm's or known, if it computes the same.

    None if the class, or one between the two, changes what is computed.
    """
    for base in kind.__mro__:
        if _is_own(base) or known(base) is not None:
            return base
        if not _COMPUTING.isdisjoint(vars(base)):
            return None
    return None


def registration_mismatch(layer: nn.Module) -> str | None:
    """Why a layer does not have the modules that are registered for its class; None if it does."""
    base = computes_as(type(layer))
    found = None if base is None else known(base)
    for name in found.then if found else ():
        if not (hasattr(layer, name) or (found and found.then_optional)):
            return f"has no {name!r}, which is registered for its class ({type(layer).__name__})"
        if not isinstance(getattr(layer, name, None), nn.Module | None):
            return f"has a {name!r} that is no module, as is registered for its class ({type(layer).__name__})"
    return None


def modules_after(layer: nn.Module) -> nn.Module:
    """The modules that a registered layer calls after normalizing, as one module; an Identity for none."""
    base = computes_as(type(layer))
    found = None if base is None else known(base)
    parts = {name: part for name in (found.then if found else ()) if (part := layer._modules.get(name)) is not None}
    if all(type(part) is nn.Identity for part in parts.values()):
        return nn.Identity().eval()
    rest = nn.Sequential().eval()
    for name, part in parts.items():
        rest.add_module(name, part)
    return rest


def _is_own(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] == "keelnorm" or kind.__module__ == NormBase.__module__
