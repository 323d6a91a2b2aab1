"""What a normalization costs: times of steps and of inference, and bytes kept for the backward."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result
from keelnorm.lab.core.plan import Plan, Seeds
from keelnorm.lab.core.seeds import seed_from
from keelnorm.lab.core.threads import one_thread
from keelnorm.lab.data import images
from keelnorm.lab.training.step_times import disagreement, stepper, take_turns
from keelnorm.measure.timing import median_ratio

RATE = 0.05
CHECKED_STEPS = 5
TOLERANCE = 1e-3
"""Relative difference of the losses, or of the outputs, of arms that have to compute the same."""
# name: (kind, widths, batch)
SIZES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "fully connected 3 × 100": ("mlp", (100, 100, 100), 60),
    "fully connected 3 × 1000": ("mlp", (1000, 1000, 1000), 120),
    "convolutional 16-32-64": ("cnn", (16, 32, 64), 64),
}


def build(kind: str, widths: tuple[int, ...], *, normalized: bool) -> nn.Sequential:
    """A network as a user would write it with torch.nn: (n, 1, H, H) -> (n, 10); fully connected ones take 8 x 8."""
    modules: list[nn.Module] = [nn.Flatten()] if kind == "mlp" else []
    into = 64 if kind == "mlp" else 1
    for layer, width in enumerate(widths):
        if kind == "mlp":
            modules.append(nn.Linear(into, width, bias=not normalized))
        else:
            modules.append(nn.Conv2d(into, width, 3, stride=1 + layer % 2, padding=1, bias=not normalized))
        if normalized:
            modules.append(nn.BatchNorm1d(width) if kind == "mlp" else nn.BatchNorm2d(width))
        modules.append(nn.ReLU())
        into = width
    modules += [] if kind == "mlp" else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*modules, nn.Linear(into, 10))


def networks(kind: str, widths: tuple[int, ...]) -> dict[str, nn.Module]:
    """By arm: without, with torch.nn's batch norm, and the same converted to keelnorm's."""
    normalized = build(kind, widths, normalized=True)
    ours, _ = kn.convert(copy.deepcopy(normalized))
    return {"none": build(kind, widths, normalized=False), "torch": normalized, "keelnorm": ours}


def costs(*, size: str, seed: int, budget: float) -> Result:
    """Time all arms in turns, on one thread, after checking that they compute the same.

    Args:
        size: one of `SIZES`.
        seed: draws data and weights.
        budget: about how many seconds to measure, half of it training.

    Returns:
        `step` and `inference`: by pair of arms, the median over rounds of the ratio of their times; `milliseconds` of
        a step; `bytes` kept for the backward by arm.

    Raises:
        ArithmeticError: when arms that have to compute the same do not.
    """
    kind, widths, batch = SIZES[size]
    with one_thread(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="cost", size=size, seed=seed))
        models = {name: model.train() for name, model in networks(kind, widths).items()}
        split = images("digits", seed)
        x, y = split.train_x[:batch], split.train_y[:batch]
        if kind == "cnn":  # as large as CIFAR's images: maps of a usual size
            x = nn.functional.interpolate(x, scale_factor=4)
        kept = {name: saved_bytes(model, x) for name, model in models.items()}
        steps = {name: stepper(model, x, y, RATE) for name, model in models.items()}
        _alike("losses in training", disagreement(steps["torch"], steps["keelnorm"], CHECKED_STEPS))
        step = take_turns(steps, budget / 2)
        evaluated = {name: model.eval() for name, model in models.items()}
        evaluated["folded"], _ = kn.fold(copy.deepcopy(evaluated["keelnorm"]), x)
        calls = {name: _inference(model, x) for name, model in evaluated.items()}
        _alike("outputs after folding", _difference(calls["keelnorm"](), calls["folded"]()))
        inference = take_turns(calls, budget / 2)
    return {
        "step": _ratios(step, (("torch", "none"), ("keelnorm", "none"), ("keelnorm", "torch"))),
        "inference": _ratios(
            inference, (("torch", "none"), ("folded", "none"), ("folded", "torch"), ("keelnorm", "torch"))
        ),
        "milliseconds": {name: round(1e3 * statistics.median(times), 4) for name, times in step.items()},
        "bytes": kept,
    }


def _ratios(taken: Mapping[str, list[float]], pairs: tuple[tuple[str, str], ...]) -> dict[str, float]:
    return {f"{first}/{second}": round(median_ratio(taken[first], taken[second]), 4) for first, second in pairs}


def _inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            y: Tensor = model(x)
            return y

    return call


def _difference(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / first.abs().max()).item()


def _alike(what: str, difference: float) -> None:
    if not difference <= TOLERANCE:
        raise ArithmeticError(
            f"the {what} of two arms that have to compute the same differ by {difference:.1e} (allowed: "
            f"{TOLERANCE:.0e}); no time is "
            "given for a wrong result"
        )


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct tensors that a forward keeps for its backward, parameters and input not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    hold: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            hold.append(tensor)  # so that no later tensor takes its place
        return tensor

    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(x)  # a converted model's first call learns what runs together
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return sum(kept.values())


def sizes(plan: Plan) -> list[str]:
    """The sizes that are timed: in quick form the first and the last."""
    names = list(SIZES)
    return [names[0], names[-1]] if plan.quick else names


def cost_cells(plan: Plan) -> list[Cell]:
    """The cells that the two claims about cost share."""
    budget = 0.4 if plan.quick else 2.0
    return [
        Cell(costs, {"size": size, "seed": seed, "budget": budget}, exclusive=True, cost=budget + 0.2)
        for size in sizes(plan)
        for seed in Seeds(quick=3, full=5).of(plan)
    ]


def by_size(plan: Plan, found: Any) -> dict[str, list[Result]]:
    """The results of `cost_cells` by size.

    Raises:
        ValueError: when a size has none.
    """
    results: dict[str, list[Result]] = {size: [] for size in sizes(plan)}
    for axes, result in found.of(cost_cells(plan)):
        results[str(axes["size"])].append(result)
    missing = [size for size, each in results.items() if not each]
    if missing:
        raise ValueError(f"no run of {missing[0]} has a result")
    return results
