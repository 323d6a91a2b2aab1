"""Keelnorm's layers made torch.nn's, for tools that look for exactly those."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import fx, nn

from keelnorm import nn as layers
from keelnorm.control.layer_selection import named
from keelnorm.engine.activations import resolve
from keelnorm.nn._shared.variant import Variant
from keelnorm.nn.batch_norm import FusedBatchNorm
from keelnorm.surgery.conversion.convert import restore, take_back
from keelnorm.surgery.conversion.counterparts import PLAIN, class_before, name_of, stop_counting
from keelnorm.surgery.known_layers import notes_on
from keelnorm.surgery.report import Report
from keelnorm.surgery.target_layers import chosen

Model = TypeVar("Model", bound=nn.Module)
_PLAIN = {**PLAIN, layers.Sequential: nn.Sequential}
_LAYERS: tuple[type[nn.Module], ...] = tuple(
    kind for name in layers.__all__ if isinstance(kind := getattr(layers, name), type) and issubclass(kind, nn.Module)
)
_OURS: tuple[type[nn.Module], ...] = (*_LAYERS, FusedBatchNorm, Variant)
#: Why a class of ours has no counterpart, where that is not that torch.nn has no such normalization.
_ANY_RANK = "takes inputs of any rank, and torch.nn has a class for each: build it as kn.BatchNorm1d, 2d or 3d"
_REASONS = {layers.BatchNorm: _ANY_RANK, layers.LazyBatchNorm: _ANY_RANK}


def to_torch(model: Model) -> tuple[Model, Report]:
    """Make every keelnorm layer of a model ``torch.nn``'s, in place, whether it was built or converted.

    For tools that ask for exact classes, as Opacus, FX quantization and ``torch.jit.script`` do. A layer changes its
    class and stays the same object: parameters, buffers, eps, momentum, mode, ``requires_grad``, hooks and places are
    what they were; a frozen layer stays frozen. Layers that :func:`convert` changed get their own classes back, and
    ``kn.Sequential`` becomes ``torch.nn.Sequential``. In a ``torch.fx.GraphModule`` calls with an activation or a
    residual are taken apart.

    Args:
        model: Any module, a layer itself included.

    Returns:
        The model itself, and a report with a row for each layer that was changed.

    Differs:
        ``torch.nn``'s layers take nothing but x in their call: code of yours that calls a layer with ``activation=``,
        ``residual`` or ``mask=`` is refused by it. What ``too_few=`` said has no counterpart either; the report notes
        it, and :func:`convert` finds it again.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: There are layers without a counterpart in ``torch.nn``; the error names them all, and the model is
            as before.

    Example:
        >>> model = layers.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNorm2d(8), nn.ReLU())
        >>> model, report = to_torch(model)
        >>> type(model) is nn.Sequential, type(model[1]) is nn.BatchNorm2d, report.rows[1]["was"]
        (True, True, 'kn.BatchNorm2d')
    """
    chosen("to_torch", model)  # says what is no model
    found: dict[str, nn.Module] = {path: each for path, each in model.named_modules() if isinstance(each, _OURS)}
    refused: dict[str, str] = {}
    for path, module in found.items():
        reason = _refusal(module)
        if reason is not None and not any(path.startswith(f"{outer}.") or not outer for outer in refused):
            refused[path] = f"{named(path)}, a {name_of(type(module))}, {reason}"
    if refused:
        raise ValueError(
            f"to_torch: {'; '.join(refused.values())}. Put torch.nn's layers in the place of these by hand; the model "
            "is as before"
        )
    was = {path: name_of(type(module)) for path, module in found.items()}
    with ExitStack() as undo:
        make_plain("to_torch", model, undo)
        undo.pop_all()
    rows = [
        {"path": path, "was": was[path], "is": name_of(type(module)), "note": _note(module)}
        for path, module in found.items()
    ]
    return model, Report("to_torch", {"layers": len(rows)}, rows, notes_on(model))


def make_plain(what: str, model: nn.Module, undo: ExitStack) -> None:
    """Make what has a counterpart in torch.nn its counterpart, in a way that ``undo`` undoes; all else stays."""
    ours = [module for module in model.modules() if isinstance(module, _OURS)]
    changing = {module for module in ours if (kind := class_before(module)) in _PLAIN or not issubclass(kind, _OURS)}
    graphs = [
        (module, _plain_calls(what, module, changing))
        for module in model.modules()
        if isinstance(module, fx.GraphModule)
    ]
    take_back(model, undo)
    for module in model.modules():
        plain = _PLAIN.get(type(module))
        if plain is not None:
            undo.callback(restore, module, module.__class__, dict(vars(module)), dict(module._buffers))
            module.__class__ = plain
            stop_counting(module)
            vars(module).pop(layers.SyncBatchNorm.CAME_FROM, None)
    for module, graph in graphs:
        if graph is not None:
            undo.callback(setattr, module, "graph", module.graph)
            module.graph = graph


def _refusal(module: nn.Module) -> str | None:
    """Why a layer of ours has no counterpart; None where it has one."""
    kind = class_before(module)
    if kind in _PLAIN or not issubclass(kind, _OURS):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize.remove_parametrizations takes that away)"
    if kind not in _LAYERS:
        return "is a class of its own, for which torch.nn has none"
    return _REASONS.get(kind, "has no counterpart in torch.nn")


def _note(module: nn.Module) -> str | None:
    policy = vars(module).get("too_few", "error")
    return None if policy == "error" else f"torch.nn has no too_few={policy!r}: one value per channel is an error there"


def _plain_calls(what: str, module: fx.GraphModule, changing: Collection[nn.Module]) -> fx.Graph | None:
    """The graph with calls of layers that take nothing but x; None where it has no others."""
    modules = dict(module.named_modules())

    def others(node: fx.Node) -> bool:
        more = len(node.args) > 1 or node.kwargs.keys() - {"input", "x"}
        return node.op == "call_module" and modules.get(node.target) in changing and bool(more)  # type: ignore[call-overload]

    if not any(map(others, module.graph.nodes)):
        return None
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if others(node):
            _take_apart(what, graph, node)
    return graph


def _take_apart(what: str, graph: fx.Graph, node: fx.Node) -> None:
    """``bn(x, residual, activation=...)`` as three nodes."""
    given: Mapping[str, Any] = {**dict(zip(("input", "residual"), node.args, strict=False)), **node.kwargs}
    more = [name for name in ("mask", "sample_weight") if given.get(name) is not None]
    if more:
        raise ValueError(
            f"{what}: the graph calls {node.target} with {' and '.join(more)}, which torch.nn's layer does not take; "
            "the model is as before"
        )
    act = resolve(str(node.target), given.get("activation"))
    with graph.inserting_before(node):
        x = fx.Proxy(graph.call_module(str(node.target), (given.get("input"),)))
        y: Any = x if given.get("residual") is None else operator.add(x, fx.Proxy(given["residual"]))
        result: Any = act.forward(y)
    node.replace_all_uses_with(result.node)
    graph.erase_node(node)
