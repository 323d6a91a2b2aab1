"""Whether a converted network is right: compared with float64, relative to the errors of eager torch."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.conversion import convert_and_learn
from benchmarks.networks.network_cases import batch_of, build, roundings
from keelnorm.bench.correctness import WrongResultError
from keelnorm.engine.fusion.call import all_sizes_wait

#: A right network has errors like eager's: only the order of its roundings differs, which a deep network with gates
#: amplifies alike. With a wrong layer the errors are orders of magnitude larger.
ALLOWED = 10.0


@all_sizes_wait()
def agreement(network: str, *, batch: int, size: int, layout: str) -> float:
    """The error of the converted network in float32 against float64, as a multiple of eager's error.

    Compares the output, every gradient and every running statistic after one training step, and then the output of
    inference. Every batch norm that can runs fused, also on small tensors. Eager's errors are taken for the images and
    for roundings of them: a gate that rounds to the other side moves some tensors far more than others.

    Args:
        network: One of `network_cases.NETWORKS`.
        batch: Images.
        size: Their height and width.
        layout: One of `keelnorm.bench.cases.LAYOUTS`.

    Raises:
        WrongResultError: The multiple is larger than `ALLOWED`.
    """
    eager = build(network, size)
    images, labels = batch_of(network, batch, size)
    exact = _results(copy.deepcopy(eager).double(), images, labels, layout)
    theirs = [
        _errors(_results(copy.deepcopy(eager), moved, labels, layout), exact)
        for moved in roundings(images, torch.finfo(torch.float32).eps)
    ]
    converted, _ = convert_and_learn(eager, images)
    return judge(_errors(_results(converted, images, labels, layout), exact), theirs)


def judge(ours: Mapping[str, float], theirs: Sequence[Mapping[str, float]]) -> float:
    """The larger of two multiples of eager's errors: of the largest error, and of the median over all tensors.

    Args:
        ours: Relative errors of the converted network by tensor.
        theirs: Those of eager, for the images and for roundings of them.

    Raises:
        WrongResultError: The multiple is larger than `ALLOWED`.
    """
    worst = max(ours, key=lambda name: ours[name] if ours[name] == ours[name] else float("inf"))
    largest = max(max(each.values()) for each in theirs)
    typical = max(*(statistics.median(each.values()) for each in theirs), torch.finfo(torch.float32).eps)
    multiple = max(ours[worst] / max(largest, typical), statistics.median(ours.values()) / typical)
    if not (multiple <= ALLOWED and ours[worst] == ours[worst]):
        raise WrongResultError(
            f"{worst} is off by {ours[worst]:.2g} of its norm, the median tensor by "
            f"{statistics.median(ours.values()):.2g}; eager is off by {largest:.2g} and {typical:.2g}, and {ALLOWED:g} "
            "times that is allowed"
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
        raise WrongResultError(f"the networks have different tensors: {sorted(found.keys() ^ exact.keys())[:3]}")
    norms = {name: float(value.norm()) for name, value in exact.items()}
    # Some gradients are zero except for rounding, such as that of a bias before a batch norm.
    smallest = 1e-3 * statistics.median(norms.values())
    return {name: float((found[name] - exact[name]).norm()) / max(norms[name], smallest) for name in exact}
