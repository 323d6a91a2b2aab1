"""Put other layers in the places of a model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch.nn import Module

#: A mapping is invariant in its keys: this takes mappings from any class of modules.
Replaced = TypeVar("Replaced", bound=Module)


def replace_layers(model: Module, new: Mapping[Replaced, Module]) -> Module:
    """Replace layers by others, wherever they are in the model, so that a shared layer stays shared.

    Args:
        model: Changed in place.
        new: The layer that takes each one's place.

    Returns:
        The model, or its replacement where it is itself one of the layers.
    """
    layers = cast(Mapping[Any, Module], new)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in layers:
                parent._modules[name] = layers[child]
    return layers.get(model, model)
