"""KN304: running statistics are updated more than once in a training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import keelnorm
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """Layers that update again in the backward; and layers that update at each of several forwards."""
    step = evidence.step
    if step is None:
        return
    late = [layer.path for layer in evidence.layers if step.late.get(layer.path)]
    if late:
        yield RULE.found(
            late,
            f"Running statistics of {len(late)} of {len(evidence.layers)} batch norms are updated again in the "
            "backward, where a checkpoint runs its modules a second time: each batch counts twice.",
            ["model, _ = kn.convert(model)  # keelnorm's layers know the second run"],
            evidence={
                "updates": max(step.updates[path] or 0 for path in late),
                "calls": max(step.calls[p] for p in late),
            },
        )
    several = [
        layer.path
        for layer in evidence.layers
        if layer.path not in late and step.calls.get(layer.path, 0) > 1 and (step.updates[layer.path] or 0) > 1
        and not layer.is_variant
    ]  # fmt: skip
    if several:
        times = max(step.updates[path] or 0 for path in several)
        yield RULE.found(
            several,
            f"Running statistics of {len(several)} of {len(evidence.layers)} batch norms are updated up to {times} "
            "times in a training step, at each call: with parts of a batch, or several inputs.",
            [
                "by_parts = loss",
                "def loss(model, batch):  # one update, with the moments of all parts\n"
                "    with kn.accumulate_statistics(model):\n        return by_parts(model, batch)",
            ],
            severity="info",
            evidence={"updates": times, "calls": max(step.calls[path] for path in several)},
        )


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.out = block, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.block, x, use_reentrant=False)
        y: Tensor = self.out(made)
        return y


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _in_halves(model: nn.Module, batch: Tensor) -> Tensor:
    """Gradient accumulation."""
    return torch.stack([model(half).square().mean() for half in batch.chunk(2)]).mean()


def _checkpoint() -> Case:
    model = _Checkpointed(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    return Case(model, ("block.1",), batches_of(16, 3), loss=_loss)


def _accumulation() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    return Case(model, ("1",), batches_of(16, 3), loss=_in_halves)


def _once() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    return Case(model, batches=batches_of(16, 3), loss=_loss)


def _known_second_run() -> Case:
    model = _Checkpointed(nn.Sequential(nn.Linear(3, 4), keelnorm.BatchNorm1d(4), nn.ReLU()))
    return Case(model, batches=batches_of(16, 3), loss=_loss)


RULE = Rule(
    id="KN304",
    name="several-updates",
    severity="warning",
    summary="Running statistics are updated more than once in a training step.",
    statistic="`num_batches_tracked` before and after the forward and the backward of one training step.",
    threshold="An update in the backward is a warning: the batch counts twice. Several in the forward are info: "
    "accumulation over parts of a batch, or several inputs, which may be meant.",
    source="torch.utils.checkpoint runs the forward again in the backward; Chen et al. (2016), arXiv:1604.06174.",
    explanation="An average with momentum m then moves by 1 − (1 − m)² at each step: it is noisier than asked for. "
    "Parts of a batch are also normalized apart, each by fewer samples.",
    remedy="Layers that know a second run, kn.convert; for accumulation kn.accumulate_statistics.",
    check=check,
    sick=(_checkpoint, _accumulation),
    healthy=(_once, _known_second_run),
    needs=("step",),
    in_training=False,
)
