"""KN113: a batch norm is the last layer of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each batch norm whose output the model returns, and nothing else reads."""
    for layer in evidence.layers:
        if layer.path and layer.beside is not None and layer.beside.returned:
            yield RULE.found(
                (layer.path,),
                f"The model returns the output of {layer.named}: in training it depends on the other samples of the "
                "batch.",
                [f"model.set_submodule({layer.path!r}, nn.Identity())  # if these are logits or predictions"],
                evidence={"calls": layer.beside.calls},
            )


def _last_of_a_sequence() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), ("1",))


class _Head(nn.Module):
    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4), last

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.conv(x))
        return {"logits": y.flatten(1) if self.last else y.mean(-1)}


def _in_another_shape() -> Case:
    return Case(_Head(last=True), ("norm",), batches=[torch.zeros(2, 3, 4)])


def _pooled() -> Case:
    return Case(_Head(last=False), batches=[torch.zeros(2, 3, 4)])


def _linear_behind() -> Case:
    return Case(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))


RULE = Rule(
    id="KN113",
    name="at-the-output",
    severity="info",
    summary="A batch norm is the last layer of the model.",
    statistic="Whether the model returns the layer's output, perhaps in another shape, and nothing else reads it.",
    threshold="Wherever that is so. It is info, because embeddings and projection heads end so on purpose.",
    source="Ioffe, Szegedy (2015), arXiv:1502.03167, section 3.2: in front of a nonlinearity, hence not at the end. A "
    "projection head that ends so: Chen, He (2020), arXiv:2011.10566, section 3.",
    explanation="Logits or predictions that are normalized over the batch have a fixed mean and variance in each class "
    "or target: a batch in which one class is frequent can't say so. In evaluation the running statistics normalize, "
    "and the output differs.",
    remedy="Take it out where the output is logits or predictions; keep it in an embedding.",
    check=check,
    sick=(_last_of_a_sequence, _in_another_shape),
    healthy=(_pooled, _linear_behind),
    needs=("neighbors",),
)
