"""Select batch norms of a model by the patterns, paths or functions that users pass as ``where``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch.nn import Module

from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, check_module, describe
from keelnorm.engine.torch_internals import BatchNormBase

#: None for all layers; a pattern for paths, or several; or a function of a path and its layer that selects it.
Where: TypeAlias = str | Iterable[str] | Callable[[str, BatchNormBase], bool] | None


def _is_layer(module: Module) -> bool:
    return isinstance(module, BatchNormBase)


def select(
    what: str, model: Module, where: Where, is_layer: Callable[[Module], bool] = _is_layer
) -> dict[str, BatchNormBase]:
    """Select batch norms of a model by their paths; each once, in the model's order.

    Args:
        what: What was called, the first words of an error.
        model: A model, or a layer itself, whose path is "".
        where: None for all. A pattern is matched against the layers' paths as by fnmatch, where ``*`` also matches
            dots; without wildcards it may also be a module's path, and selects all layers in it. A function is called
            with each path and layer.
        is_layer: Tells which modules are batch norms.

    Raises:
        TypeError: ``model`` is not a module, or ``where`` is none of these.
        ValueError: A pattern matches no layer, a function selects none, or the list of patterns is empty.
    """
    check_module(what, model)
    # A layer that stands in the model twice can be selected by either path.
    paths = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if is_layer(module)]
    if where is not None and callable(where) and not isinstance(where, type | Module):
        chosen = _chosen_by(what, where, paths)
        if not chosen:
            raise RefusedValueError(f"{what}: where selects no batch norm. {_listed(paths)}")
        paths = chosen
    elif where is not None:
        patterns = _patterns(what, where)
        for pattern in patterns:
            if not any(_matches(path, pattern) for path, _ in paths):
                raise RefusedValueError(f"{what}: where={pattern!r} matches no batch norm. {_listed(paths)}")
        paths = [(path, layer) for path, layer in paths if any(_matches(path, pattern) for pattern in patterns)]
    first: dict[BatchNormBase, str] = {}
    for path, layer in paths:
        first.setdefault(layer, path)
    return {path: layer for layer, path in first.items()}


def select_some(what: str, model: Module, where: Where) -> dict[str, BatchNormBase]:
    """As :func:`select`, but a model without batch norms is an error too.

    Raises:
        ValueError: Also if the model has no batch norm.
    """
    layers = select(what, model, where)
    if not layers:
        raise RefusedValueError(f"{what}: there is no batch norm in {type(model).__name__}. {_listed([])}")
    return layers


def named(path: str) -> str:
    """A layer's path in an error message."""
    return path or "the layer itself"


def _patterns(what: str, where: object) -> list[str]:
    patterns: list[Any] = [where] if isinstance(where, str) or not isinstance(where, Iterable) else list(where)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RefusedTypeError(
                f"{what}: where takes a pattern for paths, several, or a function of a path and its layer; got "
                f"{describe(pattern)}"
            )
    if not patterns:
        raise RefusedValueError(f"{what}: where={where!r} has no pattern, so it selects no layer; None selects all")
    return patterns


def _chosen_by(what: str, where: Callable[..., bool], paths: list[tuple[str, Module]]) -> list[tuple[str, Module]]:
    try:
        inspect.signature(where).bind("path", None)
    except TypeError as error:
        raise RefusedTypeError(
            f"{what}: where is called with a path and its layer, but {where!r} does not take these: {error}"
        ) from None
    except ValueError:
        pass  # a C function has no signature
    return [(path, layer) for path, layer in paths if where(path, layer)]


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")


def _listed(paths: list[tuple[str, Module]]) -> str:
    if not paths:
        return "The model has none (they are subclasses of BatchNormBase)"
    return "The model's are: " + ", ".join(repr(path) for path, _ in paths)
