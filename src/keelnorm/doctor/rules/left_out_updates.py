"""KN110: a layer has left out updates of its running statistics because of NaN or Inf."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from keelnorm import nn as keelnorm_nn
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each of keelnorm's layers that has counted skipped updates."""
    for layer in evidence.layers:
        if layer.skipped is None or not bool((layer.skipped > 0).any()):
            continue
        most, channels = int(layer.skipped.max()), int((layer.skipped > 0).sum())
        batches = max(layer.batches or 0, most)
        share, window = most / batches, _share_of_a_batch(layer, batches)
        severity: Severity = "error" if most == batches else "warning" if share >= window else "info"
        where = f", where={layer.path!r}" if layer.path else ""
        yield RULE.found(
            (layer.path,),
            f"{layer.named} skipped up to {most} of {batches} updates, in {channels} of {layer.skipped.numel()} "
            "channels: its input held NaN or Inf.",
            [
                "assert all(batch.isfinite().all() for batch in batches)  # else clean the data; if so, lower the rate",
                f"kn.recalibrate(model, batches{where})",
                f"{layer.code}.count_skipped()  # sets the count to 0",
            ],
            severity=severity,
            evidence={"skipped": most, "batches": batches, "share": share, "threshold": window, "channels": channels},
        )


def _share_of_a_batch(layer: LayerFacts, batches: int) -> float:
    """The weight of one batch in the running statistics."""
    return 1 / batches if layer.momentum is None else layer.momentum


def _case(skipped: int, batches: int, *, momentum: float | None = 0.1, sick: bool = True) -> Case:
    layer = keelnorm_nn.BatchNorm1d(3, momentum=momentum)
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.fill_(batches)
    layer.skipped_updates = torch.tensor([0, skipped, 0])
    return Case(nn.Sequential(layer, nn.Linear(3, 1)), ("0",) if sick else (), batches_of(4, 3))


def _every_third() -> Case:
    return _case(300, 900)


def _all() -> Case:
    return _case(50, 50)


def _few() -> Case:
    return _case(2, 10_000)


def _in_a_cumulative_average() -> Case:
    return _case(3, 100, momentum=None)


def _for_real() -> Case:
    """A layer that has seen a NaN."""
    case = _case(0, 0)
    bad = torch.ones(4, 3)
    bad[0, 1] = float("nan")
    case.model.train()(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    case.model(bad)
    return case


def _none() -> Case:
    return _case(0, 900, sick=False)


def _of_torch() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))


RULE = Rule(
    id="KN110",
    name="skipped-updates",
    severity="error",
    summary="Updates of the running statistics were skipped because of NaN or Inf.",
    statistic="skipped_updates of keelnorm's layers, the most of any channel, as a share of num_batches_tracked.",
    threshold="With momentum m the running statistics are an average over about 1/m batches. Where the share is m or "
    "more, one of these is missing on average (warning); where all were skipped, the statistics are those of a new "
    "layer (error). Fewer are info: the statistics are right, but a finite network on finite data has none.",
    source="docs/counting.md; Micikevicius et al. (2018), arXiv:1710.03740, on overflow in mixed precision.",
    explanation="A batch with NaN or Inf would spoil the running statistics, so keelnorm's layers leave its channels "
    "out. What made it is still there: bad samples, a learning rate that is too large, or an overflow of float16.",
    remedy="Find and remove the source, recalibrate, and set the count to 0.",
    check=check,
    sick=(_every_third, _all, _few, _in_a_cumulative_average, _for_real),
    healthy=(_none, _of_torch),
)
