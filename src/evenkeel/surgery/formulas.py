"""Which of the known activations a call in a graph, or a module of someone's own, computes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from evenkeel.activations import NAMED, Activation, is_untouched, of_module
from evenkeel.surgery.forward_graph import trace
from evenkeel.surgery.unchanged import UntraceableError

#: Functions and methods whose one argument is the value.
_PLAIN: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish", F.hardsigmoid: "hardsigmoid", F.mish: "mish",
    torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid", F.sigmoid: "sigmoid", "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid", torch.tanh: "tanh", torch.tanh_: "tanh", F.tanh: "tanh", "tanh": "tanh", "tanh_": "tanh",
}  # fmt: skip
#: Functions with parameters: the module that takes the same, and the parameters' names.
_WITH_PARAMETERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope",)),
    F.leaky_relu_: (nn.LeakyReLU, ("negative_slope",)),
    F.elu: (nn.ELU, ("alpha",)),
    F.elu_: (nn.ELU, ("alpha",)),
    F.gelu: (nn.GELU, ("approximate",)),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
}
#: Of one value each: whatever is made of these alone acts on every value by itself.
_POINTWISE = {
    *_PLAIN, *_WITH_PARAMETERS, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.iadd,
    operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div, torch.clamp, torch.exp, F.hardtanh,
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "clamp", "clamp_", "exp", "neg",
}  # fmt: skip


def of_node(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """The activation that a node computes of its first argument, or None.

    Args:
        module: What the node calls, if it is a module.
    """
    if module is not None:
        return None if node.kwargs or len(node.args) != 1 else of_module(module) or of_own_module(module)
    keywords = {name: value for name, value in node.kwargs.items() if name not in ("inplace", "input")}
    given = node.args[1:] if isinstance(node.target, str) else _without_inplace(node)
    plain = _PLAIN.get(node.target)
    if plain is not None:
        return None if keywords or given else NAMED[plain]
    known = _WITH_PARAMETERS.get(node.target)
    if known is None:
        return None
    kind, names = known
    values = dict(zip(names, given, strict=False)) | keywords
    if not values.keys() <= set(names) or any(isinstance(value, fx.Node) for value in values.values()):
        return None
    return of_module(kind(**values))


def argument_of(node: fx.Node) -> Any:
    """The value that a call acts on."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _without_inplace(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments behind the value; torch.nn.functional has `inplace` as the last of them."""
    given = node.args[1:]
    return given[:-1] if given and isinstance(given[-1], bool) else given


def of_own_module(module: nn.Module) -> Activation | None:
    """The known activation that a module of someone's own computes, such as ``x * torch.sigmoid(x)``.

    Its forward has to be made of operations on single values, without parameters; then it is compared with the known
    ones at 40,001 points in float64.
    """
    if next(iter(module.parameters()), None) is not None or next(iter(module.buffers()), None) is not None:
        return None
    if type(module).__module__.startswith("torch.") or not is_untouched(module.__dict__):
        return None
    children = list(module.modules())[1:]
    if any(not is_untouched(child.__dict__) or of_module(child) is None for child in children):
        return None
    try:
        graphs = [trace(module, (), training)[0] for training in (True, False)]
    except UntraceableError:
        return None
    if str(graphs[0]) != str(graphs[1]) or not all(map(_is_pointwise, graphs[0].nodes)):
        return None
    if sum(node.op == "placeholder" for node in graphs[0].nodes) != 1:
        return None
    call = fx.Interpreter(module, graph=graphs[0]).run
    return next((known for known in NAMED.values() if known.code and _same(call, known.forward)), None)


def _is_pointwise(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output", "call_module"):
        return True
    values = (*node.args, *node.kwargs.values())
    plain = all(isinstance(value, fx.Node | int | float | bool | None) for value in values)
    return node.op in ("call_function", "call_method") and node.target in _POINTWISE and plain


def _same(call: Callable[[Tensor], Any], known: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-40, 40, 40001, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = call(x.clone()), known(x)
    return (
        isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    )
