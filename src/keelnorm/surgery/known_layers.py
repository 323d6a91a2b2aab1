"""Which classes of batch norms besides torch.nn's and keelnorm's are known, and what they compute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from keelnorm.control.layer_selection import named
from keelnorm.engine.error_messages import describe

Kind = TypeVar("Kind", bound=type[nn.Module])


class Known(NamedTuple):
    """What the layers of one class compute; see :func:`register`."""

    then: tuple[str, ...] = ()
    frozen: bool = False
    #: Whether a layer may lack what ``then`` names.
    lacking: bool = False


#: Where a class that kn.convert makes for the layers of a known one has that one.
ORIGIN = "_registered"
_known: dict[type[nn.Module], Known] = {}
_ACT = ("drop", "act")
#: Other packages' classes, by their module. They are looked for in those that are loaded; nothing is imported for it.
_PACKAGES: dict[str, dict[str, Known]] = {
    "torchvision.ops.misc": {"FrozenBatchNorm2d": Known(frozen=True)},
    "detectron2.layers.batch_norm": {"FrozenBatchNorm2d": Known(frozen=True)},
    "timm.layers.norm_act": {
        "BatchNormAct2d": Known(_ACT),
        "SyncBatchNormAct": Known(_ACT, lacking=True),
        "FrozenBatchNorm2d": Known(frozen=True),
        "FrozenBatchNormAct2d": Known(_ACT, frozen=True),
    },
}
#: What a class that only says how it is made does not define.
_COMPUTING = frozenset(
    ("forward", "__call__", "compute", "normalize_batch", "normalize_running", "normalization", "uses_batch")
)


def register(kind: Kind, *, then: Sequence[str] = (), frozen: bool = False) -> Kind:
    """Say what the layers of a class of batch norms compute, so that ``kn.convert``, ``kn.fold`` and others take them.

    A layer whose class is exactly ``kind`` computes what the batch norm of ``torch.nn`` does that ``kind`` is derived
    from, with its state and options, and then what its own modules do that ``then`` names:

        y = then_n(… then_1(bn(x)))

    torchvision's and detectron2's ``FrozenBatchNorm2d`` and timm's ``BatchNormAct2d``, ``SyncBatchNormAct``,
    ``FrozenBatchNorm2d`` and ``FrozenBatchNormAct2d`` are known without this.

    Args:
        kind: The class, derived from a batch norm of ``torch.nn``, or any module if ``frozen``.
        then: Attributes of its layers, modules or None, in the order in which they are called.
        frozen: The layer normalizes with ``running_mean`` and ``running_var`` in training too. These, ``weight`` and
            ``bias`` are tensors of shape (C,), and ``eps`` is a number.

    Returns:
        ``kind``: for a class without ``then``, ``@kn.surgery.register`` above it does.

    Raises:
        TypeError, ValueError: ``kind`` is no such class, or is ``torch.nn``'s or keelnorm's own; ``then`` is no list of
            names.

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
        raise ValueError(f"register: {kind.__name__} is torch.nn's or keelnorm's own class, and known")
    if not frozen and not issubclass(kind, _BatchNorm):
        raise ValueError(
            f"register: {kind.__name__} is derived from no batch norm of torch.nn, so that nothing says what it "
            "computes; one that normalizes with fixed moments is frozen=True"
        )
    if isinstance(then, str) or not all(isinstance(name, str) for name in then):
        raise TypeError(f"register: then is a list of names of modules; got {describe(then)}")
    _known[kind] = Known(tuple(then), bool(frozen))
    return kind


def known(kind: type[Any]) -> Known | None:
    """What is known of exactly this class; None for nothing, and for torch.nn's and keelnorm's own."""
    kind = vars(kind).get(ORIGIN, kind)
    found = _known.get(kind)
    if found is None:
        found = _PACKAGES.get(kind.__module__, {}).get(kind.__name__)
        if found is not None and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind:
            return None  # of the same name, and something else
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm: of torch.nn's kind, or known."""
    return isinstance(module, _BatchNorm) or known(type(module)) is not None


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer is of a class that normalizes with fixed moments, always."""
    found = known(type(layer))
    return found is not None and found.frozen


def computes_as(kind: type[Any]) -> type[Any] | None:
    """The class of torch.nn, of keelnorm or known, itself or derived from, that says what a class computes.

    None where the class, or one between, has computations of its own.
    """
    for base in kind.__mro__:
        if _is_own(base) or known(base) is not None:
            return base
        if not _COMPUTING.isdisjoint(vars(base)):
            return None
    return None


def misfit(layer: nn.Module) -> str | None:
    """Why a layer is not what is known of its class, in words that follow its path; None if it is."""
    base = computes_as(type(layer))
    found = None if base is None else known(base)
    for name in found.then if found else ():
        if not (hasattr(layer, name) or (found and found.lacking)):
            return f"has no {name!r}, which is registered for its class ({type(layer).__name__})"
        if not isinstance(getattr(layer, name, None), nn.Module | None):
            return f"has a {name!r} that is no module, which is registered for its class ({type(layer).__name__})"
    return None


def rest_of(layer: nn.Module) -> nn.Module:
    """What a layer does behind the batch norm: its own modules, by their names; an Identity for nothing."""
    base = computes_as(type(layer))
    found = None if base is None else known(base)
    parts = {name: part for name in (found.then if found else ()) if (part := layer._modules.get(name)) is not None}
    if all(type(part) is nn.Identity for part in parts.values()):
        return nn.Identity().eval()
    rest = nn.Sequential().eval()
    for name, part in parts.items():
        rest.add_module(name, part)
    return rest


def notes_on(model: nn.Module) -> list[str]:
    """What in a model can't be seen, or is not known, in sentences for a report."""
    scripted: list[str] = []
    unknown: dict[type[nn.Module], list[str]] = {}
    for path, module in model.named_modules():
        path = named(path)
        if isinstance(module, torch.jit.ScriptModule):
            if not any(path.startswith(f"{outer}.") for outer in scripted):
                scripted.append(path)
        elif _keeps_moments(module) and (not is_norm(module) or computes_as(type(module)) is None):
            unknown.setdefault(type(module), []).append(path)
    notes = [f"{path} is a ScriptModule: batch norms inside are not seen." for path in scripted]
    for kind, paths in unknown.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        notes.append(
            f"{', '.join(paths[:3])}{more}: {kind.__module__}.{kind.__qualname__} is not known, and may "
            f"compute more than a batch norm; kn.surgery.register({kind.__name__}, ...) says what it does."
        )
    return notes


def _keeps_moments(module: nn.Module) -> bool:
    return {"running_mean", "running_var"} <= module._buffers.keys() and not isinstance(module, _InstanceNorm)


def _is_own(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] == "keelnorm" or kind.__module__ == _NormBase.__module__
