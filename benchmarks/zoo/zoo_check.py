"""Whether a converted and a folded model compute what the original does, in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn
from benchmarks.zoo.fusible_patterns import count
from benchmarks.architectures import Architecture
from keelnorm.engine.fusion import pending as fusion
from keelnorm.engine.fusion.call import all_sizes_wait
from keelnorm.engine.fusion.expectations import ATTRIBUTE
from keelnorm.surgery.observation.nested_tensors import tensors_in

#: Gradients smaller than this part of the largest of the model are compared with that: those of a bias in front of a
#: batch norm are 0 but for rounding.
LEAST_GRADIENT = 1e-3


@all_sizes_wait()
def check(one: Architecture, samples: int, small: bool = False) -> dict[str, Any]:
    """Counts and errors of one architecture, with every result waiting for what follows, however small.

    Args:
        samples: In the batch.
        small: Whether images are small.

    Returns:
        batch_norms, fusible, fused, foldable, folded: numbers; ``fusible`` and ``foldable`` are seen from a run of the
        original, ``fused`` from a run of the converted model. ``same_state``: whether the state_dicts have equal keys.
        ``converted_error``: largest difference of an output, a gradient or running statistics, in training and in
        evaluation, relative to the tensor's largest value. ``rounding``: that of the original itself, when its input
        changes by roundings. ``folded_error``: of the output. ``left``: the reasons for what was not fused.
    """
    original = one.build(small).double()
    x = one.batch(samples, torch.float64, small)
    fusible, foldable = count(copy.deepcopy(original).eval(), x)
    converted, report = kn.convert(copy.deepcopy(original))
    shaken = copy.deepcopy(original)
    errors, rounding = [], []
    noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)) * 2**-52
    _teach(converted, x)
    for training in (True, False):
        moved = results(shaken.train(training), x * (1 + noise))
        found, wanted = (results(model.train(training), x) for model in (converted, original))
        errors.append(_difference(found, wanted))
        rounding.append(_difference(moved, wanted))
    state = original.state_dict()
    same_state = list(converted.state_dict()) == list(state)
    errors.append(max((_relative(a, b) for a, b in _moments(converted.state_dict(), state)), default=0.0))
    before = fusion.completed
    with torch.no_grad():
        converted.eval()(x)
    fused = fusion.completed - before
    fresh = one.build(small).double().eval()
    folded, folding = kn.fold(fresh, x[:1], verify=False)
    with torch.no_grad():
        pairs = zip(tensors_in(folded(x)), tensors_in(fresh(x)), strict=True)
        folded_error = max(_relative(a, b) for a, b in pairs)
    return {
        "batch_norms": len(report.rows),
        "fusible": fusible,
        "fused": fused,
        "foldable": foldable,
        "folded": folding.summary["folded"],
        "same_state": same_state,
        "converted_error": max(errors),
        "rounding": max(rounding),
        "folded_error": folded_error,
        "left": sorted({_without_path(row["reason"]) for row in report.rows if row["reason"]}),
    }


def _teach(converted: nn.Module, x: Tensor) -> None:
    """Let a converted model's layers learn what follows them, and change nothing else: a copy makes the calls."""
    pupil = copy.deepcopy(converted)
    with torch.no_grad():
        for training in (True, False):
            pupil.train(training)(x)
    for layer, taught in zip(converted.modules(), pupil.modules(), strict=True):
        if ATTRIBUTE in vars(taught):
            vars(layer)[ATTRIBUTE] = vars(taught)[ATTRIBUTE]


def _without_path(reason: str) -> str:
    return re.sub(r"of '[^']*', (an? \w+),", r"of \1", reason)


def results(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients, each with the value that its errors are relative to."""
    outputs = [t for t in tensors_in(model(x)) if t.requires_grad]
    loss = sum((y.square().mean() for y in outputs), torch.zeros((), dtype=x.dtype))
    parameters = list(model.parameters())
    gradients = [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
    largest = max(g.abs().max() for g in gradients)
    values = [(y.detach(), y.detach().abs().max()) for y in outputs]
    return values + [(g, torch.maximum(g.abs().max(), LEAST_GRADIENT * largest)) for g in gradients]


def _difference(found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> float:
    return max(float((a - b).abs().max() / scale) for (a, _), (b, scale) in zip(found, wanted, strict=True))


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))


def _moments(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for name, value in wanted.items():
        if name.endswith(("running_mean", "running_var")):
            yield found[name], value
