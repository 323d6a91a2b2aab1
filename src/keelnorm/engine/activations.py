"""The activations that fuse: what a user may ask for, and each one's formula, derivative and inverse in plain torch.

    none          v                                   hardswish     v·relu6(v + 3)/6
    relu          max(v, 0)                           hardsigmoid   relu6(v + 3)/6
    relu6         min(max(v, 0), 6)                   sigmoid       1/(1 + exp(−v))
    leaky_relu    v > 0: v; else a·v                  tanh          tanh(v)
    elu           v > 0: v; else a·(exp(v) − 1)       mish          v·tanh(log(1 + exp(v)))
    silu          v·sigmoid(v)                        softplus      a·v > b: v; else log(1 + exp(a·v))/a
    gelu          v·Φ(v)
    gelu_tanh     v·(1 + tanh(√(2/π)·(v + 0.044715·v³)))/2

Derivatives at the kinks are those of torch's own backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keelnorm.engine.error_messages import describe

ActivationName: TypeAlias = Literal[
    "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "sigmoid", "tanh",
    "mish", "softplus",
]  # fmt: skip
#: What a user may ask for by ``activation=``; of modules those of ``MODULES``.
ActivationLike: TypeAlias = ActivationName | nn.Module | None


class Activation(NamedTuple):
    """One activation, as the operators take it.

    Args:
        name: As a user may give it, or "none".
        code: What the operators call it.
        a, b: Its parameters, see the module's table; 0 where it has none.
    """

    name: str
    code: int
    a: float = 0.0
    b: float = 0.0

    def forward(self, v: Tensor) -> Tensor:
        """act(v), by torch's own differentiable function."""
        return v if self.code == 0 else _FORMULAS[self.code].value(v, self.a, self.b)

    def gradient(self, g: Tensor, v: Tensor) -> Tensor:
        """g·act′(v): differentiable in g and v, to any order and in every mode."""
        return g if self.code == 0 else _FORMULAS[self.code].gradient(g, v, self.a, self.b)

    @property
    def invertible(self) -> bool:
        """Whether act(v) tells v: none, leaky_relu of a positive slope, elu of a positive alpha."""
        return self.code == 0 or (self.code in (_LEAKY_RELU, _ELU) and 0 < self.a < math.inf)

    def inverse(self, y: Tensor) -> Tensor:
        """v from y = act(v); only where :attr:`invertible`."""
        if self.code == 0:
            return y
        return torch.where(y > 0, y, y / self.a if self.code == _LEAKY_RELU else (y / self.a).log1p())


class _Formula(NamedTuple):
    """act(v) and g·act′(v), from v, a and b."""

    value: Callable[[Tensor, float, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float, float], Tensor]


def _gelu_gradient(g: Tensor, v: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(v * math.sqrt(0.5)))
    return g * (cdf + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi))


def _gelu_tanh_gradient(g: Tensor, v: Tensor) -> Tensor:
    v = v.clamp(-30, 30)  # tanh is ±1 long before, and v² stays finite
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (v + c * v * v * v))
    return g * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * (k * (1 + 3 * c * v * v)))


def _mish_gradient(g: Tensor, v: Tensor) -> Tensor:
    t = F.softplus(v).tanh()
    return g * (t + v * torch.sigmoid(v) * (1 - t * t))


def _silu_gradient(g: Tensor, v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return g * (s * (1 + v * (1 - s)))


def _sigmoid_gradient(g: Tensor, v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return g * (s * (1 - s))


_LEAKY_RELU, _ELU = 3, 4
#: By code.
_FORMULAS = (
    _Formula(lambda v, a, b: v, lambda g, v, a, b: g),
    _Formula(lambda v, a, b: torch.relu(v), lambda g, v, a, b: torch.where(v <= 0, 0, g)),
    _Formula(lambda v, a, b: F.relu6(v), lambda g, v, a, b: torch.where((v <= 0) | (v >= 6), 0, g)),
    _Formula(lambda v, a, b: F.leaky_relu(v, a), lambda g, v, a, b: torch.where(v > 0, g, g * a)),
    # exp of positive values would overflow, which a derivative of `where` does not forgive
    _Formula(lambda v, a, b: F.elu(v, a), lambda g, v, a, b: torch.where(v > 0, g, g * (a * v.clamp(max=0).exp()))),
    _Formula(lambda v, a, b: F.silu(v), lambda g, v, a, b: _silu_gradient(g, v)),
    _Formula(lambda v, a, b: F.gelu(v), lambda g, v, a, b: _gelu_gradient(g, v)),
    _Formula(lambda v, a, b: F.gelu(v, approximate="tanh"), lambda g, v, a, b: _gelu_tanh_gradient(g, v)),
    _Formula(
        lambda v, a, b: F.hardswish(v),
        lambda g, v, a, b: torch.where(v <= -3, 0, torch.where(v < 3, g * (v / 3 + 0.5), g)),
    ),
    # F.hardsigmoid lacks the forward-mode derivative of its derivative, and takes a sixth in float32
    _Formula(
        lambda v, a, b: F.hardtanh(v + 3, 0.0, 6.0) / 6,
        lambda g, v, a, b: torch.where((v > -3) & (v < 3), g * (1 / 6), 0),
    ),
    _Formula(lambda v, a, b: torch.sigmoid(v), lambda g, v, a, b: _sigmoid_gradient(g, v)),
    _Formula(lambda v, a, b: torch.tanh(v), lambda g, v, a, b: g * (1 - torch.tanh(v).square())),
    _Formula(lambda v, a, b: F.mish(v), lambda g, v, a, b: _mish_gradient(g, v)),
    _Formula(
        lambda v, a, b: F.softplus(v, a, b),
        lambda g, v, a, b: torch.where(v * a > b, g, g * torch.sigmoid(v * a)),
    ),
)

NONE = Activation("none", 0)
#: What ``activation=`` may be, apart from modules. Read on every call.
NAMED: dict[str | None, Activation] = {
    None: NONE,
    "relu": Activation("relu", 1),
    "relu6": Activation("relu6", 2),
    "leaky_relu": Activation("leaky_relu", _LEAKY_RELU, 0.01),
    "elu": Activation("elu", _ELU, 1.0),
    "silu": Activation("silu", 5),
    "gelu": Activation("gelu", 6),
    "gelu_tanh": Activation("gelu_tanh", 7),
    "hardswish": Activation("hardswish", 8),
    "hardsigmoid": Activation("hardsigmoid", 9),
    "sigmoid": Activation("sigmoid", 10),
    "tanh": Activation("tanh", 11),
    "mish": Activation("mish", 12),
    "softplus": Activation("softplus", 13, 1.0, 20.0),
}
#: The modules that stand for one, by their exact type, and the attributes that a and b come from.
MODULES: dict[type[nn.Module], tuple[str | None, tuple[str, ...]]] = {
    nn.Identity: (None, ()),
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.SiLU: ("silu", ()),
    nn.GELU: ("gelu", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Mish: ("mish", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
}


def resolve(what: str, activation: Any) -> Activation:
    """The activation that a user asked for.

    Args:
        what: What was called, the first words of an error.
        activation: None, a name of ``NAMED``, or a module of ``MODULES``, whose parameters are taken over; its
            ``inplace`` has no effect. Or an :class:`Activation` itself.

    Raises:
        ValueError: it is none of these, or a module that has a hook or a forward of its own.
    """
    if type(activation) is Activation:
        return activation
    named = activation is None or isinstance(activation, str)
    found = NAMED.get(activation) if named else of_module(activation)
    if found is None:
        raise ValueError(_refusal(what, activation))
    return found


def of_module(module: Any) -> Activation | None:
    """What calling the module computes, or None where it isn't one of ``MODULES`` as torch.nn has it."""
    known = MODULES.get(type(module))
    if known is None or not is_untouched(module.__dict__):
        return None
    name, attributes = known
    if type(module) is nn.GELU and module.approximate != "none":
        return NAMED["gelu_tanh"] if module.approximate == "tanh" else None
    if not attributes:
        return NAMED[name]
    values = [getattr(module, attribute) for attribute in attributes]
    if not all(isinstance(value, int | float) for value in values):
        return None  # a tensor, say, which may want a gradient
    return Activation(*NAMED[name][:2], *map(float, values))


def is_untouched(attributes: dict[str, Any]) -> bool:
    """Whether calling the module with these attributes runs its class's forward and nothing else."""
    return not (
        "forward" in attributes
        or attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )


def _refusal(what: str, activation: Any) -> str:
    names = ", ".join(repr(name) for name in NAMED)
    modules = ", ".join(module.__name__ for module in MODULES)
    came = describe(activation)
    if type(activation) in MODULES:
        came += ", which has a hook, a forward or a parameter of its own that a fused call would pass over"
    return (
        f"{what}: activation must be one of {names}, or a plain module of torch.nn ({modules}; no subclass); "
        f"got {came}. Anything else: call it on the result"
    )
