"""keelnorm's own layers: none is misjudged, and faults are found in them as in torch.nn's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import keelnorm as kn

#: What the constructor of a layer needs besides the number of channels.
LAYERS = {
    kn.BatchNorm: {}, kn.BatchNorm1d: {}, kn.SyncBatchNorm: {}, kn.BatchRenorm: {},
    kn.ConditionalBatchNorm: {"num_classes": 2}, kn.CrossIterationBatchNorm: {"compensate": False},
    kn.DomainBatchNorm: {"domains": 2}, kn.GhostBatchNorm: {"ghost_size": 2}, kn.L1BatchNorm: {},
    kn.MovingAverageBatchNorm: {}, kn.RangeBatchNorm: {}, kn.SplitBatchNorm: {"num_splits": 2},
    kn.StepwiseBatchNorm: {}, kn.VirtualBatchNorm: {}, kn.WhiteningBatchNorm: {},
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def made(kind, **options):
    torch.manual_seed(0)
    return nn.Sequential(kind(4, **LAYERS[kind], **options), nn.Linear(4, 2))


def test_every_layer_is_there():
    public = {kind for name in kn.nn.__all__ if isinstance(kind := getattr(kn, name), type)}
    known = {kind for kind in public if issubclass(kind, nn.modules.batchnorm._BatchNorm)}
    drop_ins = {kind for kind in known if kind.__name__.startswith(("BatchNorm", "LazyBatchNorm"))}
    assert known - drop_ins <= LAYERS.keys()


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_a_new_layer_is_healthy(kind, training):
    diagnosis = kn.diagnose(made(kind).train(training))
    assert not diagnosis.at_least("warning")
    assert {one.rule for one in diagnosis.findings} <= {"KN108"}
    assert not any("raised" in reason for reason in diagnosis.skipped.values())


@kinds
def test_faults_are_found(kind):
    model = made(kind, momentum=0.99)
    buffer = next(value for name, value in model[0].named_buffers() if "running" in name)
    buffer.flatten()[0] = float("nan")
    found = {(one.rule, one.layers[0].partition(".")[0]) for one in kn.diagnose(model).findings}
    assert {("KN103", "0"), ("KN109", "0")} <= found


def test_recurrent_layers():
    model = kn.BatchNormLSTM(3, 4, max_length=5)
    diagnosis = kn.diagnose(model, example=torch.randn(5, 2, 3))
    assert not diagnosis.at_least("warning")
    assert len(diagnosis.layers) >= 3
    next(layer for layer in model.modules() if isinstance(layer, kn.StepwiseBatchNorm)).running_var.fill_(-1.0)
    assert [one.rule for one in kn.diagnose(model, example=torch.randn(5, 2, 3)).at_least("warning")] == ["KN109"]
