"""Plan a whole model's fold: decide, compute and check each pair before anything is changed; then apply the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn._shared.replace_layers import replace_layers
from keelnorm.surgery.folding.fold_check import layer_difference, run_between, tolerance_of
from keelnorm.surgery.folding.fold_sites import CannotFoldError, Site, site_after, site_before
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
from keelnorm.surgery.known_layers import modules_after
from keelnorm.surgery.observation.call_record import Call, ModuleCall, Trace

#: The side of a batch norm on which the layer is that it is folded into.
Side: TypeAlias = Literal["before", "after"]


@dataclass
class Plan:
    """Which weights a model will get, and which batch norms will be removed.

    Args:
        weights: The new weights in float64, by the path of the layer.
        gone: The paths of the batch norms that are removed.
        rows: The report's rows, by the batch norm's path.
    """

    weights: dict[str, Weights] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


class Planner:
    """Plans the fold of one model.

    Args:
        model: The model.
        trace: Its run on the example.
        tolerance: The largest difference of a layer; None for that of its weight's dtype.
    """

    def __init__(self, model: nn.Module, trace: Trace, tolerance: float | None) -> None:
        self.plan = Plan()
        self._trace = trace
        self._layers = Layers(model, trace)
        self._tolerance = tolerance
        self._gone: set[Call] = set()
        #: The inputs of layers that the batch norm before them is folded into.
        self._inputs: dict[ModuleCall, Tensor] = {}

    def run(self, norms: dict[str, BatchNormBase]) -> Plan:
        """Plan the fold of these batch norms, in the order in which they ran."""
        ran = {call.module: i for i, call in enumerate(self._trace.modules)}
        for path, norm in sorted(norms.items(), key=lambda item: ran.get(item[1], -1)):
            row = {"path": path, "kind": type(norm).__name__, "into": "", "where": "", "difference": None, "reason": ""}
            self.plan.rows[path] = row
            refusal = self._layers.norm_refusal(norm)
            row.update({"reason": refusal} if refusal else self._place(path, norm))
        self.plan.rows = {path: self.plan.rows[path] for path in norms}
        return self.plan

    def _place(self, path: str, norm: BatchNormBase) -> dict[str, Any]:
        """Fold into the layer before, else into the layer after; return the changes of the report's row."""
        call, reasons = self._trace.calls_of(norm)[0], []
        sides: tuple[Side, Side] = ("before", "after")
        for where in sides:
            try:
                site = self._site(norm, call, where)
                difference = self._fold(norm, call, site, where)
            except CannotFoldError as reason:
                reasons.append(str(reason))
                continue
            if not _calls_more(norm):
                self._gone.add(call)
            self.plan.gone.append(path)
            return {"into": site.call.path, "where": where, "difference": difference}
        return {"reason": "; ".join(reasons)}

    def _site(self, norm: BatchNormBase, call: ModuleCall, where: Side) -> Site:
        if where == "before":
            return site_before(self._trace, call, self._gone)
        if _calls_more(norm):
            raise CannotFoldError(f"calls {', '.join(modules_after(norm)._modules)} after the normalization")
        return site_after(self._trace, call)

    def _fold(self, norm: BatchNormBase, call: ModuleCall, site: Site, where: Side) -> float:
        """Plan the fold of one pair, and return the difference that it makes.

        Raises:
            CannotFoldError: The fold would be wrong.
        """
        module, affine = site.call.module, affine_of(norm)
        refusal = self._layers.linear_refusal(module) or _pair_refusal(module, affine, where)
        if refusal:
            raise CannotFoldError(f"{site.call} {refusal}")
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        before = self.plan.weights.get(site.call.path) or weights_of(module)
        absorb = absorb_following if where == "before" else absorb_preceding
        after = absorb(module, before, affine)
        first = site.call if where == "before" else call
        x = self._inputs.get(first, _first(first))
        difference = layer_difference(norm, site, x, before, rounded(after, dtype), is_producer=where == "before")
        limit = tolerance_of(dtype) if self._tolerance is None else self._tolerance
        if not difference <= limit:
            raise CannotFoldError(
                f"{site.call} would differ by {difference:.2g} of its largest output, more than {limit:.2g}"
            )
        self.plan.weights[site.call.path] = after
        if where == "after":
            self._inputs[site.call] = run_between(site, x)
        return difference


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Give the model its new weights, and remove the batch norms that are folded."""
    for path, new in plan.weights.items():
        parameters = model.get_submodule(path)._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        parameters["weight"] = nn.Parameter(torch.empty_like(weight).copy_(new.weight), weight.requires_grad)
        if new.bias is not None:
            trains = (weight if bias is None else bias).requires_grad
            parameters["bias"] = nn.Parameter(new.bias.to(weight.dtype), trains)
    norms = [model.get_submodule(path) for path in plan.gone]
    replace_layers(model, {norm: modules_after(norm) for norm in norms})


def _first(call: ModuleCall) -> Tensor:
    x = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def _calls_more(norm: BatchNormBase) -> bool:
    """Whether a batch norm's layer calls modules after the normalization."""
    return type(modules_after(norm)) is not nn.Identity


def _pair_refusal(module: nn.Module, affine: Affine, where: Side) -> str | None:
    """Why this batch norm can't be folded into a layer that could take others; None if it can."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.device != affine.scale.device:
        return f"is on {weight.device}, the batch norm on {affine.scale.device}"
    if where == "after" and bool(affine.shift.any()):
        if is_transposed(module):
            return "is transposed, so not every output gets every term of the shift"
        if pads_with_zeros(module):
            return "pads with zeros, which would have to be shifted too"
    return None
