"""The activations that fuse: one table of their names, formulas, derivatives, inverses and modules.

C++, Triton, the readers of torch's functions and the documentation follow this table or are compared with it by tests;
docs/architecture.md says how to add an activation. Derivatives at kinks are those of torch's own backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


class Definition(NamedTuple):
    """One activation: a row of ``TABLE``, whose place there is the code that operators and kernels take.

    Args:
        name: What a user calls it; except for gelu_tanh also the name of the function in torch.nn.functional.
        formula: act(v), for the documentation, with torch's names of the parameters.
        module: The module of torch.nn that computes it.
        value: act(v) from v, a and b; torch's own differentiable function.
        gradient: g·act′(v) from g, v, a and b; differentiable in g and v, to any order and in every mode.
        inverse: v from y = act(v) and a, for 0 < a < ∞; None where y does not determine v.
        parameters: Names of a and b in torch, with torch's defaults.
        options: Other attributes of the module, and the values that they must have.
    """

    name: str
    formula: str
    module: type[nn.Module]
    value: Callable[[Tensor, float, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float, float], Tensor]
    inverse: Callable[[Tensor, float], Tensor] | None = None
    parameters: Mapping[str, float] = {}
    options: Mapping[str, str] = {}


def _gelu_gradient(g: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(v * math.sqrt(0.5)))
    return g * (cdf + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi))


def _gelu_tanh_gradient(g: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    v = v.clamp(-30, 30)  # tanh is ±1 long before, and v² stays finite
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (v + c * v * v * v))
    return g * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * (k * (1 + 3 * c * v * v)))


def _mish_gradient(g: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    t = F.softplus(v).tanh()
    return g * (t + v * torch.sigmoid(v) * (1 - t * t))


def _silu_gradient(g: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    s = torch.sigmoid(v)
    return g * (s * (1 + v * (1 - s)))


def _sigmoid_gradient(g: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    s = torch.sigmoid(v)
    return g * (s * (1 - s))


TABLE = (
    Definition(
        "none", "v", nn.Identity,
        value=lambda v, a, b: v,
        gradient=lambda g, v, a, b: g,
        inverse=lambda y, a: y,
    ),
    Definition(
        "relu", "max(v, 0)", nn.ReLU,
        value=lambda v, a, b: torch.relu(v),
        gradient=lambda g, v, a, b: torch.where(v <= 0, 0, g),
    ),
    Definition(
        "relu6", "min(max(v, 0), 6)", nn.ReLU6,
        value=lambda v, a, b: F.relu6(v),
        gradient=lambda g, v, a, b: torch.where((v <= 0) | (v >= 6), 0, g),
    ),
    Definition(
        "leaky_relu", "v if v > 0, else negative_slope·v", nn.LeakyReLU,
        value=lambda v, a, b: F.leaky_relu(v, a),
        gradient=lambda g, v, a, b: torch.where(v > 0, g, g * a),
        inverse=lambda y, a: torch.where(y > 0, y, y / a),
        parameters={"negative_slope": 0.01},
    ),
    Definition(
        "elu", "v if v > 0, else alpha·(exp(v) − 1)", nn.ELU,
        value=lambda v, a, b: F.elu(v, a),
        # Clamped: exp of a large value is infinite, and the derivative of `where` would make NaN of it.
        gradient=lambda g, v, a, b: torch.where(v > 0, g, g * (a * v.clamp(max=0).exp())),
        inverse=lambda y, a: torch.where(y > 0, y, (y / a).log1p()),
        parameters={"alpha": 1.0},
    ),
    Definition("silu", "v·sigmoid(v)", nn.SiLU, value=lambda v, a, b: F.silu(v), gradient=_silu_gradient),
    Definition(
        "gelu", "v·Φ(v)", nn.GELU,
        value=lambda v, a, b: F.gelu(v),
        gradient=_gelu_gradient,
        options={"approximate": "none"},
    ),
    Definition(
        "gelu_tanh", "v·(1 + tanh(√(2/π)·(v + 0.044715·v³)))/2", nn.GELU,
        value=lambda v, a, b: F.gelu(v, approximate="tanh"),
        gradient=_gelu_tanh_gradient,
        options={"approximate": "tanh"},
    ),
    Definition(
        "hardswish", "v·relu6(v + 3)/6", nn.Hardswish,
        value=lambda v, a, b: F.hardswish(v),
        gradient=lambda g, v, a, b: torch.where(v <= -3, 0, torch.where(v < 3, g * (v / 3 + 0.5), g)),
    ),
    Definition(
        "hardsigmoid", "relu6(v + 3)/6", nn.Hardsigmoid,
        # F.hardsigmoid lacks the forward-mode derivative of its derivative, and rounds 1/6 to float32.
        value=lambda v, a, b: F.hardtanh(v + 3, 0.0, 6.0) / 6,
        gradient=lambda g, v, a, b: torch.where((v > -3) & (v < 3), g * (1 / 6), 0),
    ),
    Definition(
        "sigmoid", "1/(1 + exp(−v))", nn.Sigmoid,
        value=lambda v, a, b: torch.sigmoid(v),
        gradient=_sigmoid_gradient,
    ),
    Definition(
        "tanh", "tanh(v)", nn.Tanh,
        value=lambda v, a, b: torch.tanh(v),
        gradient=lambda g, v, a, b: g * (1 - torch.tanh(v).square()),
    ),
    Definition(
        "mish", "v·tanh(log(1 + exp(v)))", nn.Mish, value=lambda v, a, b: F.mish(v), gradient=_mish_gradient
    ),
    Definition(
        "softplus", "v if beta·v > threshold, else log(1 + exp(beta·v))/beta", nn.Softplus,
        value=lambda v, a, b: F.softplus(v, a, b),
        gradient=lambda g, v, a, b: torch.where(v * a > b, g, g * torch.sigmoid(v * a)),
        parameters={"beta": 1.0, "threshold": 20.0},
    ),
)  # fmt: skip


class Activation(NamedTuple):
    """One activation, as the operators take it.

    Args:
        name: Its name in ``TABLE``.
        code: Its place in ``TABLE``.
        a, b: Its parameters; 0 where it has none.
    """

    name: str
    code: int
    a: float = 0.0
    b: float = 0.0

    def forward(self, v: Tensor) -> Tensor:
        """act(v), by torch's own differentiable function."""
        return TABLE[self.code].value(v, self.a, self.b)

    def gradient(self, g: Tensor, v: Tensor) -> Tensor:
        """g·act′(v): differentiable in g and v, to any order and in every mode."""
        return TABLE[self.code].gradient(g, v, self.a, self.b)

    @property
    def invertible(self) -> bool:
        """Whether act(v) determines v: none, leaky_relu of a positive slope, elu of a positive alpha."""
        row = TABLE[self.code]
        return row.inverse is not None and (not row.parameters or 0 < self.a < math.inf)

    def inverse(self, y: Tensor) -> Tensor:
        """Find v from y = act(v); only where :attr:`invertible`."""
        inverse = TABLE[self.code].inverse
        if inverse is None:
            raise ValueError(f"{self.name} has no inverse")
        return inverse(y, self.a)


NONE = Activation("none", 0)
#: What ``activation=`` may be, apart from modules. Read on every call.
NAMED: dict[str | None, Activation] = {
    row.name if code else None: Activation(row.name, code, *row.parameters.values()) for code, row in enumerate(TABLE)
}
#: The rows of each module, found by its exact type.
MODULES: dict[type[nn.Module], list[tuple[Definition, Activation]]] = {}
for _row, _activation in zip(TABLE, NAMED.values(), strict=True):
    MODULES.setdefault(_row.module, []).append((_row, _activation))


def resolve(what: str, activation: Any) -> Activation:
    """Find the activation that a user asked for.

    Args:
        what: The function or layer that was called, which begins an error message.
        activation: None, a name of ``NAMED``, or a module of ``MODULES``, whose parameters are taken over; its
            ``inplace`` has no effect. Or an :class:`Activation` itself.

    Raises:
        ValueError: The activation is none of these, or a module that has a hook or a forward of its own.
    """
    if type(activation) is Activation:
        return activation
    named = activation is None or isinstance(activation, str)
    found = NAMED.get(activation) if named else of_module(activation)
    if found is None:
        raise ValueError(_refusal(what, activation))
    return found


def of_module(module: Any) -> Activation | None:
    """The activation that a module computes; None unless it is an unchanged module of ``MODULES``."""
    rows = MODULES.get(type(module))
    if rows is None or not is_untouched(module.__dict__):
        return None
    for row, activation in rows:
        if row.options and any(getattr(module, option) != value for option, value in row.options.items()):
            continue
        if not row.parameters:
            return activation
        values = [getattr(module, parameter) for parameter in row.parameters]
        if all(isinstance(value, int | float) for value in values):  # no tensor, which may require a gradient
            return Activation(row.name, activation.code, *map(float, values))
    return None


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
        came += ", which has a hook, a forward or a parameter of its own that a fused call would ignore"
    return (
        f"{what}: activation must be one of {names}, or a plain module of torch.nn ({modules}; no subclass); "
        f"got {came}. Call any other activation on the result"
    )
