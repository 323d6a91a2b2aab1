"""Which batch norms of a model are meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.errors import describe

#: None for all; a pattern for paths, or several.
Where: TypeAlias = str | Iterable[str] | None


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
            without wildcards it may also be the path of a module, and means all layers in it.
        is_layer: Which modules are batch norms.

    Raises:
        TypeError: ``model`` is no module, or a pattern is no string.
        ValueError: A pattern matches no layer.
    """
    if not isinstance(model, Module):
        hint = ". A state_dict has no layers: load it into its model first" if isinstance(model, Mapping) else ""
        raise TypeError(f"{what}: model must be a torch.nn.Module; got {describe(model)}{hint}")
    # A layer that hangs in the model twice can be meant by either path.
    paths = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if is_layer(module)]
    if where is not None:
        patterns = [where] if isinstance(where, str) else list(where)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{what}: where takes a pattern for paths or several; got {describe(pattern)}")
            if not any(_matches(path, pattern) for path, _ in paths):
                raise ValueError(f"{what}: where={pattern!r} matches no batch norm. {_listed(paths)}")
        paths = [(path, layer) for path, layer in paths if any(_matches(path, pattern) for pattern in patterns)]
    first: dict[_BatchNorm, str] = {}
    for path, layer in paths:
        first.setdefault(layer, path)  # type: ignore[arg-type]
    return {path: layer for layer, path in first.items()}


def named(path: str) -> str:
    """A layer's path as an error says it."""
    return path or "the layer itself"


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")


def _listed(paths: list[tuple[str, Module]]) -> str:
    if not paths:
        return "The model has none (they are subclasses of torch.nn.modules.batchnorm._BatchNorm)"
    return "The model's are: " + ", ".join(repr(path) for path, _ in paths)
