"""Select batch norms of a model by the patterns, paths or functions that users pass as ``where``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.engine.error_messages import check_module, describe

#: None for all; a pattern for paths, or several; or a function of a path and its layer that says whether it is meant.
Where: TypeAlias = str | Iterable[str] | Callable[[str, _BatchNorm], bool] | None


def _is_layer(module: Module) -> bool:
    return isinstance(module, _BatchNorm)


def select(
    what: str, model: Module, where: Where, is_layer: Callable[[Module], bool] = _is_layer
) -> dict[str, _BatchNorm]:
    """The batch norms of ``model`` that ``where`` names, by their paths; each once, in the model's order.

    Args:
        what: What was called, the first words of an error.
        model: A model, or a layer itself, whose path is "".
        where: None for all. A pattern is matched against the layers' paths as in fnmatch, where ``*`` also takes dots;
            without wildcards it may also be the path of a module, and means all layers in it. A function is called with
            each path and layer.
        is_layer: Which modules are batch norms.

    Raises:
        TypeError: ``model`` is no module, or ``where`` none of these.
        ValueError: A pattern matches no layer, or a function chooses none; there is no pattern.
    """
    check_module(what, model)
    # A layer that hangs in the model twice can be meant by either path.
    paths = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if is_layer(module)]
    if where is not None and callable(where) and not isinstance(where, type | Module):
        chosen = _chosen_by(what, where, paths)
        if not chosen:
            raise ValueError(f"{what}: where chose no batch norm. {_listed(paths)}")
        paths = chosen
    elif where is not None:
        patterns = _patterns(what, where)
        for pattern in patterns:
            if not any(_matches(path, pattern) for path, _ in paths):
                raise ValueError(f"{what}: where={pattern!r} matches no batch norm. {_listed(paths)}")
        paths = [(path, layer) for path, layer in paths if any(_matches(path, pattern) for pattern in patterns)]
    first: dict[_BatchNorm, str] = {}
    for path, layer in paths:
        first.setdefault(layer, path)  # type: ignore[arg-type]
    return {path: layer for layer, path in first.items()}


def select_some(what: str, model: Module, where: Where) -> dict[str, _BatchNorm]:
    """As :func:`select`, for what would do nothing, and say nothing, on a model without batch norms.

    Raises:
        ValueError: Also where the model has none.
    """
    layers = select(what, model, where)
    if not layers:
        raise ValueError(f"{what}: there is no batch norm in {type(model).__name__}. {_listed([])}")
    return layers


def named(path: str) -> str:
    """A layer's path as an error says it."""
    return path or "the layer itself"


def _patterns(what: str, where: object) -> list[str]:
    patterns: list[Any] = [where] if isinstance(where, str) or not isinstance(where, Iterable) else list(where)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{what}: where takes a pattern for paths, several, or a function of a path and its layer; got "
                f"{describe(pattern)}"
            )
    if not patterns:
        raise ValueError(f"{what}: where={where!r} has no pattern, so it would mean no layer; None means all")
    return patterns


def _chosen_by(what: str, where: Callable[..., bool], paths: list[tuple[str, Module]]) -> list[tuple[str, Module]]:
    try:
        inspect.signature(where).bind("path", None)
    except TypeError as error:
        raise TypeError(
            f"{what}: where is called with a path and its layer, which {where!r} can't be: {error}"
        ) from None
    except ValueError:
        pass  # a function of C has no signature to look at
    return [(path, layer) for path, layer in paths if where(path, layer)]


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")


def _listed(paths: list[tuple[str, Module]]) -> str:
    if not paths:
        return "The model has none (they are subclasses of torch.nn.modules.batchnorm._BatchNorm)"
    return "The model's are: " + ", ".join(repr(path) for path, _ in paths)
