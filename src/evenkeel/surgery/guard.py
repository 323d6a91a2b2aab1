"""What has to be as it was when a forward was traced for its graph to say what the forward does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from evenkeel.surgery.forward_graph import INTERNAL, Reads

_MISSING = object()
#: Values that are compared; all others have to be the same object.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Guard:
    """Whether modules still have the children, attributes and hooks that a graph was made with.

    Args:
        inlined: The modules whose forwards the graph contains, the one that it is of first.
        called: The modules that the graph calls in another way than their owner's forward would: batch norms and
            activations that run as one. Neither may have a hook, a forward of its own, or a new class.
        reads: What the forwards have read.
    """

    def __init__(self, inlined: Collection[nn.Module], called: Collection[nn.Module], reads: Reads) -> None:
        first, *inner = inlined
        self.plain = [*called, *inner]
        self.classes = [type(module) for module in self.plain]
        self.own: type = type(first)
        self.first = first
        owners = list(dict.fromkeys(part for module in inlined for part in _containers(module)))
        self.children = [(module, list(module._modules.values())) for module in owners]
        self.equal: list[tuple[nn.Module, str, Any]] = []
        self.same: list[tuple[nn.Module, str, Any]] = []
        self.present: list[tuple[nn.Module, str, bool]] = []
        #: Modules whose mode the graph depends on, besides the first one's.
        self.modes: list[nn.Module] = []
        for module, names in reads.names.items():
            for name in names:
                self._watch(module, name)

    def _watch(self, module: nn.Module, name: str) -> None:
        if name == "training":
            if module is not self.first:
                self.modes.append(module)
        elif name in module.__dict__ and name not in INTERNAL:
            value = module.__dict__[name]
            if isinstance(value, _PLAIN):
                self.equal.append((module, name, value))
            elif isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
                self.equal.append((module, name, type(value)(value)))
            else:
                self.same.append((module, name, value))
        elif name in module._parameters or name in module._buffers:
            self.present.append((module, name, _member(module, name) is not None))

    def holds(self) -> bool:
        """Asked on every call."""
        if (
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            return False
        for module, kind in zip(self.plain, self.classes, strict=True):
            attributes = module.__dict__
            if (
                type(module) is not kind
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"]
                or attributes["_backward_pre_hooks"]
                or ("forward" in attributes and not getattr(attributes["forward"], "is_fused", False))
            ):
                return False
        for module, children in self.children:
            if list(module._modules.values()) != children:
                return False
        for module, name, value in self.equal:
            if module.__dict__.get(name, _MISSING) != value:
                return False
        for module, name, value in self.same:
            if module.__dict__.get(name, _MISSING) is not value:
                return False
        for module, name, there in self.present:
            if (_member(module, name) is not None) != there:
                return False
        mode = self.first.training
        return all(module.training == mode for module in self.modes)


def _member(module: nn.Module, name: str) -> Any:
    members: Mapping[str, Any] = module._parameters if name in module._parameters else module._buffers
    return members.get(name)


def _containers(module: nn.Module) -> list[nn.Module]:
    """The module, and the containers in it that are never called: their children are its own."""
    inner = [m for m in module._modules.values() if isinstance(m, nn.ModuleList | nn.ModuleDict)]
    return [module, *(part for container in inner for part in _containers(container))]
