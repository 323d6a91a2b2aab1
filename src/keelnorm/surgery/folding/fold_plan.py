"""What folding will do to a model: decided, computed and checked layer by layer before anything is changed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.surgery.folding.fold_check import along, layer_difference, tolerance_of
from keelnorm.surgery.folding.fold_sites import Site, site_after, site_before
from keelnorm.surgery.folding.fold_weights import (
    Affine,
    Weights,
    absorb_following,
    absorb_preceding,
    affine_of,
    rounded,
    weights_of,
)
from keelnorm.surgery.folding.foldable_layers import Layers, is_transposed, pads_with_zeros
from keelnorm.surgery.known_layers import rest_of
from keelnorm.surgery.observation.call_record import Call, ModuleCall, Trace


@dataclass
class Plan:
    """Which weights a model will get, and which batch norms will be gone; by path.

    Args:
        weights: In float64.
        gone: The batch norms.
        rows: The report's, by the batch norm's path.
    """

    weights: dict[str, Weights] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


class Planner:
    """Makes the plan.

    Args:
        model: The model.
        trace: Its run on the example.
        tolerance: The largest difference of a layer; None for the one of its weight's dtype.
    """

    def __init__(self, model: nn.Module, trace: Trace, tolerance: float | None) -> None:
        self.plan = Plan()
        self._trace = trace
        self._layers = Layers(model, trace)
        self._tolerance = tolerance
        self._gone: set[Call] = set()
        #: What enters layers before which a batch norm is gone.
        self._inputs: dict[ModuleCall, Tensor] = {}

    def run(self, norms: dict[str, _BatchNorm]) -> Plan:
        """Plan for these batch norms, in the order in which they ran."""
        ran = {call.module: i for i, call in enumerate(self._trace.modules)}
        for path, norm in sorted(norms.items(), key=lambda item: ran.get(item[1], -1)):
            row = {"path": path, "kind": type(norm).__name__, "into": "", "where": "", "difference": None, "reason": ""}
            self.plan.rows[path] = row
            refusal = self._layers.norm_refusal(norm)
            row.update({"reason": refusal} if refusal else self._place(path, norm))
        self.plan.rows = {path: self.plan.rows[path] for path in norms}
        return self.plan

    def _place(self, path: str, norm: _BatchNorm) -> dict[str, Any]:
        """Fold into the layer before, else into the one after; the row's changes."""
        call, reasons = self._trace.calls_of(norm)[0], []
        ends = type(rest_of(norm)) is nn.Identity
        for where in ("before", "after"):
            if where == "after" and not ends:
                reasons.append(f"calls {', '.join(rest_of(norm)._modules)} behind the normalization")
                continue
            site = site_before(self._trace, call, self._gone) if where == "before" else site_after(self._trace, call)
            if isinstance(site, str):
                reasons.append(site)
                continue
            found = self._fold(norm, call, site, where)
            if isinstance(found, float):
                if ends:
                    self._gone.add(call)
                self.plan.gone.append(path)
                return {"into": site.call.path, "where": where, "difference": found}
            reasons.append(f"{site.call} {found}")
        return {"reason": "; ".join(reasons)}

    def _fold(self, norm: _BatchNorm, call: ModuleCall, site: Site, where: str) -> float | str:
        """The difference that it makes; or in words why it is not done."""
        module, affine = site.call.module, affine_of(norm)
        refusal = self._layers.linear_refusal(module) or _misfit(module, norm, affine, where)
        if refusal:
            return refusal
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        before = self.plan.weights.get(site.call.path) or weights_of(module)
        absorb = absorb_following if where == "before" else absorb_preceding
        after = absorb(module, before, affine)
        first = site.call if where == "before" else call
        x = self._inputs.get(first, _first(first))
        off = layer_difference(norm, site, x, before, rounded(after, dtype), is_producer=where == "before")
        limit = tolerance_of(dtype) if self._tolerance is None else self._tolerance
        if not off <= limit:
            return f"would differ by {off:.2g} of its largest output, more than {limit:.2g}"
        self.plan.weights[site.call.path] = after
        if where == "after":
            self._inputs[site.call] = along(site, x)
        return off


def apply_plan(model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    """Change the model; ``undo`` takes what puts it back."""
    for path, new in plan.weights.items():
        parameters = model.get_submodule(path)._parameters
        undo.callback(parameters.update, dict(parameters))
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        parameters["weight"] = nn.Parameter(torch.empty_like(weight).copy_(new.weight), weight.requires_grad)
        if new.bias is not None:
            trains = (weight if bias is None else bias).requires_grad
            parameters["bias"] = nn.Parameter(new.bias.to(weight.dtype), trains)
    for path in plan.gone:
        parent, _, name = path.rpartition(".")
        modules = model.get_submodule(parent)._modules
        undo.callback(modules.update, {name: modules[name]})
        modules[name] = rest_of(modules[name])  # type: ignore[arg-type]


def _first(call: ModuleCall) -> Tensor:
    x = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def _misfit(module: nn.Module, norm: _BatchNorm, affine: Affine, where: str) -> str | None:
    """Why a layer can't take this batch norm in."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.device != affine.scale.device:
        return f"is on {weight.device}, the batch norm on {affine.scale.device}"
    if where == "after" and bool(affine.shift.any()):
        if is_transposed(module):
            return "is transposed, and not every output gets every term of the shift"
        if pads_with_zeros(module):
            return "pads with zeros, which would have to be shifted"
    return None
