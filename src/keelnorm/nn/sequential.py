"""A Sequential in which a batch norm and the operation after it run as one kernel."""

from __future__ import annotations

from typing import Any

import torch

from keelnorm.engine.fusion.expectations import ATTRIBUTE, Memory
from keelnorm.engine.fusion.scope import scope_of
from keelnorm.nn._shared.layer_base import Layer
from keelnorm.nn._shared.module_errors import KeelnormModule


class Sequential(KeelnormModule, torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs a keelnorm batch norm and the activation after it as one fused operation.

    The result of a batch norm waits for the operation that follows, as in a model that :func:`keelnorm.convert` has
    converted; the first call records which one that is. The modules stay unchanged: names, state_dict, indexing and
    slicing are those of ``torch.nn.Sequential``.

    Example:
        >>> import keelnorm as kn
        >>> net = Sequential(torch.nn.Conv2d(3, 8, 3), kn.BatchNorm2d(8), torch.nn.ReLU())
        >>> net(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Any) -> Any:
        """Run the modules in order."""
        if torch.compiler.is_compiling() or not isinstance(input, torch.Tensor):
            return super().forward(input)
        for module in self._modules.values():
            if isinstance(module, Layer) and ATTRIBUTE not in module.__dict__:
                module.__dict__[ATTRIBUTE] = Memory()
        with scope_of(self):
            return super().forward(input)
