"""Batch norm, addition, activation: found in a module's graph, and made one call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from evenkeel.activations import NAMED, Activation, is_untouched, resolve
from evenkeel.surgery.formulas import argument_of, of_node
from evenkeel.surgery.forward_graph import Reads

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Fused(NamedTuple):
    """One batch norm with what follows it.

    Args:
        layer: The path of the batch norm, from the module whose graph it is.
        activation: What runs with it, "none" for a bare addition.
        by: The activation's path as a module, or the name of the function with (); "" for none.
        residual: Whether an addition runs with it.
    """

    layer: str
    activation: str
    by: str
    residual: bool


class Refused(NamedTuple):
    """A batch norm that has an activation or an addition behind it, and why they stay apart."""

    layer: str
    reason: str


def fuse(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    fusible: Callable[[nn.Module], bool],
    training: bool,
    reads: Reads,
) -> tuple[list[Fused], list[Refused]]:
    """Rewrite the graph so that each batch norm takes with it the addition and the activation behind it.

    Args:
        modules: The modules that the graph calls, by path.
        fusible: Whether a module is a batch norm that takes a residual and an activation.
        training: The mode that the graph is of.
        reads: Gets what the rewritten graph depends on, besides what the forward has read.
    """
    _pass_over_identities(graph, modules, training, reads)
    fused: list[Fused] = []
    refused: list[Refused] = []
    # The last one first: where two batch norms are added, the earlier one is the other's residual.
    for node in reversed(list(graph.nodes)):
        if node.op == "call_module" and fusible(modules[node.target]):
            found = _fuse_one(graph, node, modules, fusible)
            (fused if isinstance(found, Fused) else refused).append(found) if found else None  # type: ignore[arg-type]
    graph.lint()
    return fused[::-1], refused[::-1]


def _fuse_one(
    graph: fx.Graph, bn: fx.Node, modules: Mapping[str, nn.Module], fusible: Callable[[nn.Module], bool]
) -> Fused | Refused | None:
    addition, residual = _addition_behind(bn)
    last = bn if addition is None else addition
    activation, nodes = _activation_behind(last, modules)
    if addition is None and activation is None:
        return _refusal(bn, modules)
    path = str(bn.target)
    if len(bn.args) != 1 or "activation" in bn.kwargs or "residual" in bn.kwargs:
        return Refused(path, "is called with an activation or a residual already")
    if not is_untouched(modules[path].__dict__):
        return Refused(path, "has a hook or a forward of its own")
    x = bn.args[0]
    if addition is not None and (not isinstance(x, fx.Node) or len(x.users) > 1):
        return Refused(path, "its input is read again before the addition, which may change it")
    keyword: Any = None
    if activation is not None:
        keyword = activation.name if activation == NAMED.get(activation.name) else activation
    end = nodes[0] if nodes else last
    with graph.inserting_before(end):
        if addition is None:
            new = graph.call_module(path, bn.args, {**bn.kwargs, "activation": keyword})
        else:
            layer = graph.create_node("get_attr", path)
            new = graph.call_function(add_and_activate, (layer, x, residual, keyword), dict(bn.kwargs))
    end.replace_all_uses_with(new)
    for node in dict.fromkeys((*nodes, last, bn)):
        graph.erase_node(node)
    by = ""
    if nodes:
        name = str(getattr(end.target, "__name__", end.target))
        by = name if end.op == "call_module" else f"{name}()"
    return Fused(path, "none" if activation is None else activation.name, by, addition is not None)


def add_and_activate(
    layer: nn.Module, x: Tensor, residual: Any, activation: str | Activation | None, **keywords: Any
) -> Tensor:
    """``act(layer(x) + residual)``: in one call, where the residual has x's shape."""
    if isinstance(residual, Tensor) and residual.shape == x.shape:
        return layer(x, residual, activation=activation, **keywords)  # type: ignore[no-any-return]
    y: Tensor = layer(x, **keywords) + residual
    return resolve(type(layer).__name__, activation).forward(y)


def _addition_behind(bn: fx.Node) -> tuple[fx.Node | None, Any]:
    """The addition that alone reads the batch norm's output, and what is added to it."""
    user = _only_user(bn)
    if user is None or user.target not in _ADDITIONS or user.kwargs or len(user.args) != 2:
        return None, None
    a, b = user.args
    other = b if a is bn else a
    return (None, None) if other is bn or not isinstance(other, fx.Node) else (user, other)


def _activation_behind(
    node: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[Activation | None, tuple[fx.Node, ...]]:
    """The activation that alone reads a node, and the nodes that compute it, the last one first."""
    user = _only_user(node)
    if user is not None and argument_of(user) is node:
        found = of_node(user, modules.get(str(user.target)) if user.op == "call_module" else None)
        if found is not None and found.code:
            return found, (user,)
    users = list(node.users)
    for gate, product in zip(users, reversed(users), strict=True) if len(users) == 2 else ():  # x·sigmoid(x)
        if (
            argument_of(gate) is node
            and _is_sigmoid(gate, modules)
            and _only_user(gate) is product
            and product.target in (operator.mul, torch.mul, "mul")
            and set(product.args) == {node, gate}
            and not product.kwargs
        ):
            return NAMED["silu"], (product, gate)
    return None, ()


def _is_sigmoid(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    found = of_node(node, modules.get(str(node.target)) if node.op == "call_module" else None)
    return found is not None and found.name == "sigmoid"


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _refusal(bn: fx.Node, modules: Mapping[str, nn.Module]) -> Refused | None:
    """Why a batch norm with an activation among its readers stays as it is."""
    if len(bn.users) > 1:
        for user in bn.users:
            module = modules.get(str(user.target)) if user.op == "call_module" else None
            if argument_of(user) is bn and of_node(user, module) is not None:
                return Refused(str(bn.target), "its output is read by another besides the activation")
    only = _only_user(bn)
    if only is not None and only.op == "call_module":
        module = modules[str(only.target)]
        if not is_untouched(module.__dict__) and isinstance(module, nn.Module) and not list(module.children()):
            return Refused(str(bn.target), f"{only.target!r} behind it has a hook or a forward of its own")
    return None


def _pass_over_identities(graph: fx.Graph, modules: Mapping[str, nn.Module], training: bool, reads: Reads) -> None:
    """Take out what hands its input on: Identity, and Dropout in evaluation or of probability 0."""
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        module = modules[node.target]
        dropout = isinstance(module, _DropoutNd) and type(module).__module__ == nn.Dropout.__module__
        hands_on = type(module) is nn.Identity or (dropout and (module.p == 0 or not training))
        if hands_on and is_untouched(module.__dict__):
            if dropout:
                reads.names.setdefault(module, {}).update(
                    {"p": None} if module.p == 0 else {"p": None, "training": None}
                )
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
