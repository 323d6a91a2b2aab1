"""What the optimizer's next update does to the weights in front of batch norms: it is tried on copies."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from keelnorm.doctor.evidence.layers import LayerFacts


@dataclass(frozen=True)
class Update:
    """What one update does to weights whose length has no effect, because a batch norm follows.

    Args:
        source: The layer with the weights, in words.
        angle: By how much they turn, in radians. Their length has no effect, so this is all that is learned.
        growth: By what their norm grows, as a share of it.
        lost: The share of the weights with a gradient that are as before, since the change is below half of a weight's
            last digit.
        rate: The learning rate.
        decay: The weight decay; None where the optimizer has no such option.
        dtype: The weights' dtype.
    """

    source: str
    angle: float
    growth: float
    lost: float
    rate: float
    decay: float | None
    dtype: torch.dtype


def updates_of(layers: Iterable[LayerFacts], optimizer: Optimizer) -> dict[str, Update]:
    """What the next update does to the weights in front of each batch norm, by the batch norm's path.

    Copies of the weights, their gradients and the optimizer's state are stepped by a copy of the optimizer. Layers
    whose weights have no gradient, or are not the optimizer's, are left out.

    Raises:
        Exception: The optimizer can't be copied, or its step needs something else.
    """
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    sources = {path: found for path, found in _sources(layers) if id(found[1]) in groups and found[1].grad is not None}
    if not sources:
        return {}
    before = {id(weight): weight.detach().clone() for _, weight in sources.values()}
    after = _stepped(optimizer, {id(weight): weight for _, weight in sources.values()})
    return {
        path: _update(name, before[id(weight)], after[id(weight)], weight.grad, groups[id(weight)])
        for path, (name, weight) in sources.items()
    }


def _sources(layers: Iterable[LayerFacts]) -> Iterator[tuple[str, tuple[str, nn.Parameter]]]:
    """The weights that alone make the input of a batch norm."""
    for layer in layers:
        if layer.beside is None or not layer.beside.alone or len(layer.beside.before) != 1:
            continue
        [neighbor] = layer.beside.before
        weight = getattr(neighbor.module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and neighbor.function.startswith(("conv", "linear")):
            yield layer.path, (neighbor.name, weight)


def _stepped(optimizer: Optimizer, weights: dict[int, nn.Parameter]) -> dict[int, Tensor]:
    """The weights after a step of the optimizer's copy, which has copies of them."""
    copies = {key: nn.Parameter(weight.detach().clone()) for key, weight in weights.items()}
    for key, one in copies.items():
        gradient = weights[key].grad
        one.grad = None if gradient is None else gradient.detach().clone()
    twin = copy.copy(optimizer)  # without hooks, and without what a schedule has put in the place of its step
    twin.state = defaultdict(
        dict,
        {
            copies[key]: copy.deepcopy(optimizer.state[weight])
            for key, weight in weights.items()
            if weight in optimizer.state
        },
    )
    twin.param_groups = []
    for group in optimizer.param_groups:
        own = [copies[id(one)] for one in group["params"] if id(one) in copies]
        if own:
            twin.param_groups.append({**group, "params": own})
    with torch.enable_grad():
        type(twin).step(twin)
    return {key: one.detach() for key, one in copies.items()}


def _update(name: str, before: Tensor, after: Tensor, gradient: Tensor | None, group: dict[str, Any]) -> Update:
    assert gradient is not None
    moved = gradient != 0
    lost = float(((after == before) & moved).sum()) / max(int(moved.sum()), 1)
    w, change = before.double().flatten(), after.double().flatten() - before.double().flatten()
    square = w.dot(w).clamp(min=torch.finfo(torch.float64).tiny)
    along = w.dot(change) / square
    across = (change - along * w).norm() / square.sqrt()  # so that a small angle keeps its digits
    return Update(
        source=name,
        angle=float(torch.atan2(across, 1 + along)),
        growth=float(((1 + along).square() + across.square()).sqrt() - 1),
        lost=lost,
        rate=float(group.get("lr", 0.0)),
        decay=None if group.get("weight_decay") is None else float(group["weight_decay"]),
        dtype=before.dtype,
    )
