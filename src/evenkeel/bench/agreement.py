"""Whether two networks compute the same: held against float64, with eager's own rounding as the measure."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .check import WrongResultError
from .fusing import use_evenkeel
from .networks import batch_of, build

#: A right network errs like eager does: it differs in the order of its roundings, which a deep network
#: with gates amplifies alike. A layer that is wrongly wired is off by orders of magnitude more.
ALLOWED = 10.0


def agreement(network: str, *, batch: int, size: int, layout: str) -> float:
    """The largest error of evenkeel's float32 results, as a multiple of what eager's may be off by.

    Compares the output, every gradient and every running statistic after one training step, and then
    the output of inference. What eager's may be off by is its own error for that tensor, and at least
    the median of its errors, since one tensor can be exact by luck.

    Raises:
        WrongResultError: evenkeel's network is off by more than `ALLOWED` times that.
    """
    eager = build(network, size)
    exact = _results(copy.deepcopy(eager).double(), batch, size, layout)
    theirs = _errors(_results(copy.deepcopy(eager), batch, size, layout), exact)
    ours = _errors(_results(use_evenkeel(eager), batch, size, layout), exact)
    floor = max(statistics.median(theirs.values()), torch.finfo(torch.float32).eps)
    return judge(ours, theirs, floor)


def judge(ours: Mapping[str, float], theirs: Mapping[str, float], floor: float) -> float:
    """The largest of our errors over theirs; raises where it is too large."""
    multiples = {name: ours[name] / max(theirs[name], floor) for name in theirs}
    worst = max(multiples, key=lambda name: multiples[name] if multiples[name] == multiples[name] else float("inf"))
    if not multiples[worst] <= ALLOWED:  # NaN fails too
        raise WrongResultError(
            f"{worst} is off by {ours[worst]:.2g} of its norm, {multiples[worst]:.3g} times what eager's is; "
            f"allowed {ALLOWED:g}"
        )
    return multiples[worst]


def _results(net: nn.Module, batch: int, size: int, layout: str) -> dict[str, Tensor]:
    images, labels = batch_of(batch, size)
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
