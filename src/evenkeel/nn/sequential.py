"""A Sequential that runs a batch norm and the activation after it as one."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn.modules import module as torch_module

from evenkeel.activations import MODULES, is_untouched, of_module
from evenkeel.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, refuse_script

_LAYERS = (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_FUSED = frozenset(MODULES) - {torch.nn.Identity}
#: Those that a name says all of; the others are handed on as they are.
_NAMES: dict[type[torch.nn.Module], str] = {torch.nn.ReLU: "relu"}


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs an evenkeel batch norm and the activation after it as one fused operation.

    The activations are the modules of torch.nn for those of :func:`evenkeel.functional.batch_norm`.
    The modules stay what and where they are: names, state_dict, indexing and slicing are ``torch.nn.Sequential``'s.
    A pair runs unfused, and right, when one of the two has a hook, a forward of its own, or is of another class.

    Example:
        >>> net = Sequential(torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8), torch.nn.ReLU())
        >>> net(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Any) -> Any:
        """Run the modules in order."""
        modules = list(self._modules.values())
        i = 0
        while i < len(modules):
            module = modules[i]
            assert module is not None
            # A torch.fx proxy is no tensor: the graph gets both modules, for tools that look for them.
            if i + 1 < len(modules) and isinstance(input, torch.Tensor) and _fuses(module, modules[i + 1]):
                input = module(input, activation=_NAMES.get(type(modules[i + 1]), modules[i + 1]))  # type: ignore[arg-type]
                i += 2
            else:
                input = module(input)
                i += 1
        return input

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


# Asked for every pair on every call, so written out: loops over the names of hooks cost more than the layer on small
# tensors.


def _fuses(layer: torch.nn.Module, activation: torch.nn.Module | None) -> bool:
    return (
        type(layer) in _LAYERS
        and type(activation) in _FUSED
        and is_untouched(layer.__dict__)
        and of_module(activation) is not None
        and not (
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        )
    )
