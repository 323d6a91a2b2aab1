"""Whether two networks compute the same: held against float64, with eager's own rounding as the measure."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from keelnorm.bench.correctness import WrongResultError
from benchmarks.networks.fusing import use_keelnorm
from benchmarks.networks.networks import batch_of, build, roundings

#: A right network errs like eager does: it differs in the order of its roundings, which a deep network
#: with gates amplifies alike. A layer that is wrongly wired is off by orders of magnitude more.
ALLOWED = 10.0


def agreement(network: str, *, batch: int, size: int, layout: str) -> float:
    """How far keelnorm's float32 results are from float64's, as a multiple of how far eager's get.

    Compares the output, every gradient and every running statistic after one training step, and then
    the output of inference. Eager's are taken for the images and for roundings of them: a gate that
    falls the other way moves some tensors by far more than the others.

    Raises:
        WrongResultError: keelnorm's network is off by more than `ALLOWED` times that.
    """
    eager = build(network, size)
    images, labels = batch_of(batch, size)
    exact = _results(copy.deepcopy(eager).double(), images, labels, layout)
    theirs = [
        _errors(_results(copy.deepcopy(eager), moved, labels, layout), exact)
        for moved in roundings(images, torch.finfo(torch.float32).eps)
    ]
    return judge(_errors(_results(use_keelnorm(eager), images, labels, layout), exact), theirs)


def judge(ours: Mapping[str, float], theirs: Sequence[Mapping[str, float]]) -> float:
    """The larger of two multiples: of our largest error over theirs, and of the medians over all tensors.

    Raises:
        WrongResultError: it is too large.
    """
    worst = max(ours, key=lambda name: ours[name] if ours[name] == ours[name] else float("inf"))
    largest = max(max(each.values()) for each in theirs)
    typical = max(*(statistics.median(each.values()) for each in theirs), torch.finfo(torch.float32).eps)
    multiple = max(ours[worst] / max(largest, typical), statistics.median(ours.values()) / typical)
    if not (multiple <= ALLOWED and ours[worst] == ours[worst]):
        raise WrongResultError(
            f"{worst} is off by {ours[worst]:.2g} of its norm, the median tensor by "
            f"{statistics.median(ours.values()):.2g}; eager's by {largest:.2g} and {typical:.2g}, and allowed are "
            f"{ALLOWED:g} times that"
        )
    return multiple


def _results(net: nn.Module, images: Tensor, labels: Tensor, layout: str) -> dict[str, Tensor]:
    images = images.to(next(net.parameters()).dtype)
    if layout == "channels_last":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    net.train()
    y = net(images)
    nn.functional.cross_entropy(y, labels).backward()
    found = {f"gradient of {name}": value.grad for name, value in net.named_parameters() if value.grad is not None}
    found |= {name: value for name, value in net.named_buffers() if value.is_floating_point()}
    found["output in training"] = y.detach()
    net.eval()
    with torch.no_grad():
        found["output in inference"] = net(images)
    return {name: value.double() for name, value in found.items()}


def _errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    if found.keys() != exact.keys():
        raise WrongResultError(f"other tensors come out: {sorted(found.keys() ^ exact.keys())[:3]}")
    norms = {name: float(value.norm()) for name, value in exact.items()}
    # Some gradients are zero but for rounding, as of a bias in front of another batch norm.
    smallest = 1e-3 * statistics.median(norms.values())
    return {name: float((found[name] - exact[name]).norm()) / max(norms[name], smallest) for name in exact}
