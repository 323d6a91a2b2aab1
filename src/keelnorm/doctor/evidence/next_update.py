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
    that normalize with fixed statistics are left out, since there the length of the weights counts; so are those whose
    weights have no gradient, or are not the optimizer's.

    Raises:
        Exception: The optimizer can't be copied, or its step needs something else.
    """
    check_own_state(optimizer)
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    sources = {path: found for path, found in _sources(layers) if id(found[1]) in groups and found[1].grad is not None}
    if not sources:
        return {}
    weights = {id(weight): weight for _, weight in sources.values()}
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    after = _stepped(optimizer, weights)
    changed = [key for key, weight in weights.items() if not torch.equal(weight.detach(), before[key])]
    if changed:  # a step that reaches the model past its parameters
        with torch.no_grad():
            for key in changed:
                weights[key].copy_(before[key])
        raise RuntimeError("its step changed the model's own weights, which were put back")
    return {
        path: _update(name, before[id(weight)], after[id(weight)], weight.grad, groups[id(weight)])
        for path, (name, weight) in sources.items()
    }


def check_own_state(optimizer: Optimizer) -> None:
    """Raise for what only wraps an optimizer: it would pass a step on.

    Raises:
        TypeError: It is no ``torch.optim.Optimizer``, or its state and groups are those of another object.
    """
    own = vars(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else {}
    inner = [name for name, value in own.items() if isinstance(value, torch.optim.Optimizer)]
    if inner or not {"state", "param_groups", "defaults"} <= own.keys():
        raise TypeError("it wraps another optimizer; pass that one")
    if any(hasattr(type(optimizer), name) for name in ("state", "param_groups")):
        raise TypeError("its state and its groups are computed, and not its own")


def _sources(layers: Iterable[LayerFacts]) -> Iterator[tuple[str, tuple[str, nn.Parameter]]]:
    """The weights that alone make the input of a batch norm."""
    for layer in layers:
        if layer.held or layer.fixed or layer.beside is None or not layer.beside.alone or len(layer.beside.before) != 1:
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
    kind: Any = type(optimizer)
    state: dict[Any, Any] = defaultdict(
        dict,
        {
            copies[key]: copy.deepcopy(optimizer.state[weight])
            for key, weight in weights.items()
            if weight in optimizer.state
        },
    )
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        own = [copies[id(one)] for one in group["params"] if id(one) in copies]
        if own:
            groups.append({**group, "params": own})
    # An object of the same class that has these three entries and nothing else of the optimizer: no hooks, nothing that
    # a schedule has put in the place of its step, and nothing that leads to the optimizer's own parameters.
    twin = kind.__new__(kind)
    twin.__setstate__({"defaults": dict(optimizer.defaults), "state": state, "param_groups": groups})
    step = kind.step
    if getattr(step, "hooked", False):  # torch's wrapper, which calls the hooks of all optimizers
        step = step.__wrapped__
    with torch.enable_grad():
        step(twin)
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
