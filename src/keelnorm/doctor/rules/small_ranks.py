"""KN115: each process normalizes a small batch by itself."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isinf, sqrt

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts, counted
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule

#: Above it the standard error of a variance is above one half of the variance: √(2/(N − 1)) > 1/2 for N ≤ 8.
LARGEST_ERROR = 0.5


def check(evidence: Evidence) -> Iterator[Finding]:
    """All layers that normalize the samples of one process, or of one device, alone."""
    ranks = max(evidence.ranks, _devices(evidence.model))
    samples = None if evidence.batches is None else evidence.batches.samples
    if ranks < 2 or samples is None:
        return
    own = samples if evidence.ranks > 1 else samples / ranks
    error = inf if own <= 1 else sqrt(2 / (own - 1))
    layers = [layer for layer in evidence.layers if _is_alone(layer)]
    if layers and error > LARGEST_ERROR:
        yield RULE.found(
            (layer.path for layer in layers),
            f"Each of {ranks} {_word(evidence)} normalizes {own:g} samples by itself, in {counted(len(layers))}: "
            f"the variance of {own:g} independent values {_exactness(error)}.",
            [
                "model = kn.SyncBatchNorm.convert_sync_batchnorm(model)  # before DistributedDataParallel"
                if evidence.ranks > 1
                else "model = model.module  # then one process for each device, and kn.SyncBatchNorm"
            ],
            evidence={"samples": own, "ranks": ranks, "standard error": error, "threshold": LARGEST_ERROR},
        )


def _exactness(error: float) -> str:
    return "is not defined" if isinf(error) else f"has a standard error of {100 * error:.0f} %"


def _word(evidence: Evidence) -> str:
    return "processes" if evidence.ranks > 1 else "devices"


def _devices(model: nn.Module) -> int:
    """The number of devices among which DataParallel splits a batch."""
    return len(model.device_ids) if isinstance(model, nn.DataParallel) else 1


def _is_alone(layer: LayerFacts) -> bool:
    """Whether the layer normalizes with the batch of its own process, when it trains."""
    if layer.held or layer.fixed or layer.is_variant:  # variants have their own remedy
        return False
    return layer.training and "sync" not in type(layer.module).__name__.lower()


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))


def _two_samples() -> Case:
    return Case(_model(), ("1", "3"), batches=[torch.zeros(2, 3)], ranks=8)


def _one_sample() -> Case:
    return Case(_model(), ("1", "3"), batches=[torch.zeros(1, 3)], ranks=2)


def _eight_samples() -> Case:
    return Case(_model(), ("1", "3"), batches=[torch.zeros(8, 3)], ranks=2)


def _sixteen_samples() -> Case:
    return Case(_model(), batches=[torch.zeros(16, 3)], ranks=8)


def _synchronized() -> Case:
    return Case(nn.SyncBatchNorm.convert_sync_batchnorm(_model()), batches=[torch.zeros(2, 3)], ranks=8)


def _one_process() -> Case:
    return Case(_model(), batches=[torch.zeros(2, 3)])


def _frozen() -> Case:
    from keelnorm.control import freeze

    model = _model()
    freeze(model)
    return Case(model, batches=[torch.zeros(2, 3)], ranks=8)


RULE = Rule(
    id="KN115",
    name="small-ranks",
    severity="warning",
    summary="Each process normalizes a small batch by itself.",
    statistic="The samples N in the first batch of this process (of a device, under DataParallel), where several run "
    "and the layers are not synchronized.",
    threshold="The variance of N independent values has a standard error of √(2/(N − 1)) of itself; above 1/2, which "
    "is N ≤ 8. Positions of an image are correlated, so samples are counted, not values. With N = 8 ResNet-50 on "
    "ImageNet loses 1 point, with 4 it loses 4, with 2 it loses 11 (source, table 2).",
    source="Wu, He (2018), arXiv:1803.08494, table 2; Peng et al. (2018), arXiv:1711.07240, on synchronized "
    "statistics.",
    explanation="Under DistributedDataParallel every process normalizes with its own samples. The batch of the "
    "optimizer is large, and that of a batch norm is not: its output is noisy, and the running statistics are those of "
    "one process.",
    remedy="Use synchronized layers, or a larger batch on each process; kn.freeze in fine-tuning.",
    check=check,
    sick=(_two_samples, _one_sample, _eight_samples),
    healthy=(_sixteen_samples, _synchronized, _one_process, _frozen),
    needs=("batch",),
)
