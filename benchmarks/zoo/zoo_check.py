"""Compare a converted and a folded model with the original, in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import keelnorm as kn
from benchmarks.architectures import Architecture
from benchmarks.conversion import convert_and_learn
from benchmarks.training_steps import outputs_and_loss
from benchmarks.zoo.fusible_patterns import count_patterns
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.call import all_sizes_wait
from keelnorm.surgery.observation.nested_tensors import tensors_in

#: The error of a smaller gradient is relative to this part of the model's largest gradient: the gradient of a bias
#: before a batch norm is 0 except for rounding.
LEAST_GRADIENT = 1e-3
#: The largest error of a right result, or this many times what rounding the input does to the original.
MOST_ERROR = 1e-10
TIMES_ROUNDING = 10.0


@dataclass
class ZooCheck:
    """Counts and errors of one architecture.

    Args:
        batch_norms: Batch norms of the model.
        fusible: Calls that could be fused, counted in a run of the original.
        fused: Calls that were fused, counted in a run of the converted model.
        foldable: Batch norms behind a layer they can be folded into, counted in a run of the original.
        folded: Batch norms that were folded.
        same_state: Whether the state_dicts of original and converted model have the same keys.
        converted_error: The largest error of an output, a gradient or a running statistic, in training and in
            evaluation, relative to the tensor's largest value.
        rounding: That of the original itself, when its input changes by rounding errors.
        folded_error: The largest error of the folded model's outputs.
        left: The reasons for what was not fused.
    """

    batch_norms: int
    fusible: int
    fused: int
    foldable: int
    folded: int
    same_state: bool
    converted_error: float
    rounding: float
    folded_error: float
    left: list[str]

    @property
    def is_right(self) -> bool:
        """Whether all errors are rounding errors."""
        allowed = max(MOST_ERROR, TIMES_ROUNDING * self.rounding)
        return self.same_state and self.converted_error <= allowed and self.folded_error <= MOST_ERROR


@all_sizes_wait()
def check_architecture(one: Architecture, samples: int, *, small: bool = False) -> ZooCheck:
    """Count and compare one architecture, with every batch norm that can running fused, also on small tensors.

    Args:
        one: The architecture.
        samples: Samples in the batch.
        small: Whether to take small images.
    """
    original = one.build(any_size=small).double()
    x = one.batch(samples, torch.float64, size=one.small_size if small else None)
    fusible, foldable = count_patterns(copy.deepcopy(original).eval(), x)
    converted, report = convert_and_learn(copy.deepcopy(original), x)
    converted_error, rounding = _compare_converted(original, converted, x)
    before = pending.completed
    with torch.no_grad():
        converted.eval()(x)
    fused = pending.completed - before
    fresh = one.build(any_size=small).double().eval()
    folded, folding = kn.fold(fresh, x[:1], verify=False)
    with torch.no_grad():
        pairs = zip(tensors_in(folded(x)), tensors_in(fresh(x)), strict=True)
        folded_error = max(_relative(a, b) for a, b in pairs)
    return ZooCheck(
        batch_norms=len(report.rows),
        fusible=fusible,
        fused=fused,
        foldable=foldable,
        folded=folding.summary["folded"],
        same_state=list(converted.state_dict()) == list(original.state_dict()),
        converted_error=converted_error,
        rounding=rounding,
        folded_error=folded_error,
        left=sorted({_without_path(row["reason"]) for row in report.rows if row["reason"]}),
    )


def _compare_converted(original: nn.Module, converted: nn.Module, x: Tensor) -> tuple[float, float]:
    """The error of a converted model, and that of the original when its input changes by rounding errors."""
    shaken = copy.deepcopy(original)
    noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)) * 2**-52
    errors, rounding = [], []
    for training in (True, False):
        moved = results(shaken.train(training), x * (1 + noise))
        found, wanted = (results(model.train(training), x) for model in (converted, original))
        errors.append(_difference(found, wanted))
        rounding.append(_difference(moved, wanted))
    pairs = _running_statistics(converted.state_dict(), original.state_dict())
    errors.append(max((_relative(a, b) for a, b in pairs), default=0.0))
    return max(errors), max(rounding)


def _without_path(reason: str) -> str:
    return re.sub(r"of '[^']*', (an? \w+),", r"of \1", reason)


def results(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients, each with the magnitude that its error is relative to."""
    outputs, loss = outputs_and_loss(model, x)
    parameters = list(model.parameters())
    gradients = [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
    largest = max(g.abs().max() for g in gradients)
    values = [(y.detach(), y.detach().abs().max()) for y in outputs]
    return values + [(g, torch.maximum(g.abs().max(), LEAST_GRADIENT * largest)) for g in gradients]


def _difference(found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> float:
    return max(float((a - b).abs().max() / scale) for (a, _), (b, scale) in zip(found, wanted, strict=True))


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))


def _running_statistics(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for name, value in wanted.items():
        if name.endswith(("running_mean", "running_var")):
            yield found[name], value
