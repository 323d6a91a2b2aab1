"""Every activation as torch computes it, and its kinks: what the kernels' tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _hardsigmoid(v: Tensor) -> Tensor:
    return F.hardtanh(v + 3, 0, 6) / 6  # the derivative of F.hardsigmoid has 1/6 rounded to float32


#: torch's function of each activation, with its default parameters.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": _hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "softplus": F.softplus,
}
#: Modules of torch.nn: one for each activation, and some with other parameters.
MODULES = (
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(2.0), nn.ELU(), nn.ELU(0.3), nn.SiLU(), nn.GELU(),
    nn.GELU("tanh"), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Softplus(),
    nn.Softplus(2.5, 3.0),
)  # fmt: skip
_KINKS = {
    "relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "elu": (0.0,), "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0), "softplus": (20.0,),
}  # fmt: skip
_KINKS_OF_MODULES = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.ELU: "elu", nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
}  # fmt: skip


def function_of(activation: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """The function that a module computes, with a derivative that is right in float64."""
    if activation is None:
        return lambda v: v * 1
    return _hardsigmoid if isinstance(activation, nn.Hardsigmoid) else activation


def kinks_of(activation: str | nn.Module | None) -> tuple[float, ...]:
    """Where the value or the derivative of an activation jumps."""
    if isinstance(activation, nn.Softplus):
        return (activation.threshold / activation.beta,)
    name = activation if isinstance(activation, str) else _KINKS_OF_MODULES.get(type(activation), "")
    return _KINKS.get(name, ())
