"""Replace keelnorm's layers by torch.nn's, for tools that look for exactly those classes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import fx, nn

from keelnorm import nn as layers
from keelnorm.control.layer_selection import named
from keelnorm.engine.activations import resolve
from keelnorm.nn._shared.variant import Variant
from keelnorm.nn.batch_norm import FusedBatchNorm
from keelnorm.surgery.conversion.convert import undo_conversion
from keelnorm.surgery.conversion.counterparts import PLAIN, class_before, name_of, stop_counting
from keelnorm.surgery.report import Report
from keelnorm.surgery.snapshot import all_or_nothing
from keelnorm.surgery.target_layers import batch_norms_in, notes_on

Model = TypeVar("Model", bound=nn.Module)
_PLAIN = {**PLAIN, layers.Sequential: nn.Sequential}
_LAYERS: tuple[type[nn.Module], ...] = tuple(
    kind for name in layers.__all__ if isinstance(kind := getattr(layers, name), type) and issubclass(kind, nn.Module)
)
_OURS: tuple[type[nn.Module], ...] = (*_LAYERS, FusedBatchNorm, Variant)
#: Classes that have no counterpart for another reason than that torch.nn lacks such a normalization.
_ANY_RANK = "takes inputs of any rank, and torch.nn has a class for each: build it as kn.BatchNorm1d, 2d or 3d"
_REASONS = {layers.BatchNorm: _ANY_RANK, layers.LazyBatchNorm: _ANY_RANK}


def to_torch(model: Model) -> tuple[Model, Report]:
    """Replace keelnorm's layers in a model by ``torch.nn``'s, in place, whether they were built or converted.

    For tools that check for exact classes, as Opacus, FX quantization and ``torch.jit.script`` do. A layer changes its
    class and stays the same object: its parameters, buffers, eps, momentum, mode, ``requires_grad``, hooks and paths
    stay, and a frozen layer stays frozen. Layers that :func:`convert` changed get their own classes back, and
    ``kn.Sequential`` becomes ``torch.nn.Sequential``. In a ``torch.fx.GraphModule``, calls with an activation or a
    residual are split into separate operations.

    Args:
        model: Any module, also a layer itself.

    Returns:
        The model itself, and a report with a row for each layer that was changed.

    Differs:
        ``torch.nn``'s layers take only x, so your own code must not call a layer with ``activation=``, ``residual`` or
        ``mask=``. ``too_few=`` has no counterpart either; the report notes it, and :func:`convert` restores it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Layers have no counterpart in ``torch.nn``. The error names them all; the model is as before.

    Example:
        >>> model = layers.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNorm2d(8), nn.ReLU())
        >>> model, report = to_torch(model)
        >>> type(model) is nn.Sequential, type(model[1]) is nn.BatchNorm2d, report.rows[1]["was"]
        (True, True, 'kn.BatchNorm2d')
    """
    batch_norms_in("to_torch", model)  # raises if it is no model
    found: dict[str, nn.Module] = {path: each for path, each in model.named_modules() if isinstance(each, _OURS)}
    refused: dict[str, str] = {}
    for path, module in found.items():
        reason = _refusal(module)
        if reason is not None and not any(path.startswith(f"{outer}.") or not outer for outer in refused):
            refused[path] = f"{named(path)}, a {name_of(type(module))}, {reason}"
    if refused:
        raise ValueError(
            f"to_torch: {'; '.join(refused.values())}. Replace these by torch.nn's layers by hand; the model is as "
            "before"
        )
    rows = make_plain("to_torch", model, found)
    for row, module in zip(rows, found.values(), strict=True):
        row["note"] = _note(module)
    return model, Report("to_torch", {"layers": len(rows)}, rows, notes_on(model))


def make_plain(what: str, model: nn.Module, reported: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Replace each layer that has a counterpart in torch.nn by it; other layers stay.

    Args:
        what: The public function that was called, for errors.
        model: Changed in place.
        reported: The layers of the report, by path.

    Returns:
        A row for each of these layers: what it was, and what it is.
    """
    was = {path: name_of(type(module)) for path, module in reported.items()}
    ours = [module for module in model.modules() if isinstance(module, _OURS)]
    changing = {module for module in ours if (kind := class_before(module)) in _PLAIN or not issubclass(kind, _OURS)}
    graphs = [
        (module, _plain_calls(what, module, changing))
        for module in model.modules()
        if isinstance(module, fx.GraphModule)
    ]
    with all_or_nothing(model.modules()):
        undo_conversion(model)
        for module in model.modules():
            plain = _PLAIN.get(type(module))
            if plain is not None:
                module.__class__ = plain
                stop_counting(module)
                vars(module).pop(layers.SyncBatchNorm.CAME_FROM, None)
        for module, graph in graphs:
            if graph is not None:
                module.graph = graph
    return [{"path": path, "was": was[path], "is": name_of(type(module))} for path, module in reported.items()]


def _refusal(module: nn.Module) -> str | None:
    """Why a layer of keelnorm has no counterpart; None if it has one."""
    kind = class_before(module)
    if kind in _PLAIN or not issubclass(kind, _OURS):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize.remove_parametrizations removes that)"
    if kind not in _LAYERS:
        return "is a class of its own, for which torch.nn has none"
    return _REASONS.get(kind, "has no counterpart in torch.nn")


def _note(module: nn.Module) -> str | None:
    policy = vars(module).get("too_few", "error")
    return None if policy == "error" else f"torch.nn has no too_few={policy!r}: one value per channel is an error there"


def _plain_calls(what: str, module: fx.GraphModule, changing: Collection[nn.Module]) -> fx.Graph | None:
    """A copy of the graph in which layers are called with nothing but x; None if they already are."""
    modules = dict(module.named_modules())

    def has_more(node: fx.Node) -> bool:
        more = len(node.args) > 1 or node.kwargs.keys() - {"input", "x"}
        return node.op == "call_module" and modules.get(node.target) in changing and bool(more)

    if not any(map(has_more, module.graph.nodes)):
        return None
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if has_more(node):
            _split_call(what, graph, node)
    return graph


def _split_call(what: str, graph: fx.Graph, node: fx.Node) -> None:
    """Replace the node ``bn(x, residual, activation=...)`` by three nodes."""
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
