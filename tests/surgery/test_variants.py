"""Each operation on running statistics is right for each layer of keelnorm, or refuses it by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn

#: A layer of 4 channels, the keywords of its call, and what it says that is its own: data, scale, evaluation.
VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "BatchNorm": (lambda: kn.BatchNorm(4), {}, ()),
    "BatchNorm1d": (lambda: kn.BatchNorm1d(4), {}, ()),
    "SyncBatchNorm": (lambda: kn.SyncBatchNorm(4), {}, ()),
    "GhostBatchNorm": (lambda: kn.GhostBatchNorm(4, 8), {}, ()),
    "BatchRenorm": (lambda: kn.BatchRenorm(4), {}, ()),
    "CrossIterationBatchNorm": (lambda: kn.CrossIterationBatchNorm(4, compensate=False), {}, ()),
    "ConditionalBatchNorm": (lambda: kn.ConditionalBatchNorm(4, 3), {"condition": "labels"}, ("evaluation",)),
    "SplitBatchNorm": (lambda: kn.SplitBatchNorm(4), {}, ("data", "evaluation")),
    "DomainBatchNorm": (lambda: kn.DomainBatchNorm(4, 2), {"domain": 1}, ("data", "evaluation")),
    "StepwiseBatchNorm": (lambda: kn.StepwiseBatchNorm(4, 3), {"step": 1}, ("data", "evaluation")),
    "VirtualBatchNorm": (lambda: referenced(kn.VirtualBatchNorm(4)), {}, ("data", "evaluation")),
    "MovingAverageBatchNorm": (lambda: kn.MovingAverageBatchNorm(4), {}, ("scale",)),
    "L1BatchNorm": (lambda: kn.L1BatchNorm(4), {}, ("scale",)),
    "RangeBatchNorm": (lambda: kn.RangeBatchNorm(4), {}, ("scale",)),
    "WhiteningBatchNorm": (lambda: kn.WhiteningBatchNorm(4), {}, ("scale", "evaluation")),
}
X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
variants = pytest.mark.parametrize("name", VARIANTS)


def referenced(layer):
    layer.set_reference(torch.randn(64, 4))
    return layer


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        make, self.keywords, _ = VARIANTS[name]
        self.linear, self.bn = nn.Linear(3, 4), make()

    def forward(self, x):
        keywords = {key: torch.arange(len(x)) % 3 if key == "condition" else v for key, v in self.keywords.items()}
        return self.bn(self.linear(x), **keywords)


def net(name, calls=2):
    """After a few training steps."""
    model = Net(name)
    for i in range(calls):
        model(X + i)
    return model


def own(name):
    return VARIANTS[name][2]


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_every_layer_is_here():
    public = [getattr(kn, name) for name in kn.nn.__all__]
    kinds = {k for k in public if isinstance(k, type) and issubclass(k, nn.modules.batchnorm._BatchNorm)}
    spatial = {kn.BatchNorm2d, kn.BatchNorm3d, *(k for k in kinds if issubclass(k, nn.modules.lazy.LazyModuleMixin))}
    assert {k.__name__ for k in kinds - spatial} == VARIANTS.keys()


@variants
def test_says_what_it_keeps(name):
    layer = VARIANTS[name][0]()
    for what in ("data", "scale", "evaluation"):
        said = getattr(layer, f"own_{what}", None)
        assert (said is not None) == (what in own(name))


@variants
@pytest.mark.parametrize("sequential", [False, True])
def test_recalibrate(name, sequential):
    model = net(name)
    before = state_of(model)
    model, report = kn.recalibrate(model, [X[:16], X[16:]], sequential=sequential)
    row = report.rows[0]
    if {"data", "scale"} & set(own(name)):
        assert is_unchanged(model, before)
        assert row["reason"].startswith(f"is a {name}, which keeps ")
        assert report.summary["layers"] == 0
    else:
        values = model.linear(X).detach().double()
        assert row["reason"] is None
        torch.testing.assert_close(model.bn.running_mean.double(), values.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.bn.running_var.double(), values.var(0), rtol=1e-5, atol=1e-5)


@variants
@pytest.mark.parametrize("mode", ["cumulative", "batch"])
def test_adapt(name, mode):
    model = net(name).eval()
    before = state_of(model)
    _, report = kn.adapt(model, [X] if mode == "cumulative" else None, mode=mode)
    if {"data", "scale"} & set(own(name)):
        assert is_unchanged(model, before)
        assert report.rows[0]["reason"].startswith(f"is a {name}, which keeps ")
    else:
        assert report.rows[0]["reason"] is None
        values = model.linear(X).detach()
        expected = F.batch_norm(values, None, None, training=True)
        if mode == "cumulative":  # which keeps the unbiased variance
            expected = expected * (31 / 32) ** 0.5
        if name != "ConditionalBatchNorm":
            weight, bias = model.bn.weight, model.bn.bias
            torch.testing.assert_close(model(X), expected * weight + bias, rtol=1e-3, atol=1e-3)
        kn.reset_adaptation(model)
    assert is_unchanged(model, before)


@variants
def test_fold(name):
    model = net(name).eval()
    expected = model(X)
    folded, report = kn.fold(model, X)
    if "evaluation" in own(name):
        assert f"is a {name}, which evaluates " in report.rows[0]["reason"]
        assert type(folded.bn) is type(model.bn)
    else:
        assert report.rows[0]["into"] == "linear"
        assert isinstance(folded.bn, nn.Identity)
    if "evaluation" not in own(name):
        vars(folded)["keywords"] = {}
    torch.testing.assert_close(folded(X), expected, rtol=1e-4, atol=1e-4)


@variants
def test_merge_statistics(name):
    models = [net(name, calls) for calls in (1, 3)]
    states = [model.state_dict() for model in models]
    if "scale" in own(name):
        with pytest.raises(ValueError, match="local=True"):
            kn.merge_statistics(states, [10, 30])
    else:
        merged, report = kn.merge_statistics(states, [10, 30])
        mean = (10 * states[0]["bn.running_mean"] + 30 * states[1]["bn.running_mean"]) / 40
        torch.testing.assert_close(merged["bn.running_mean"], mean)
        assert report.rows[0]["path"] == "bn"
        models[0].load_state_dict(merged)
    shared, _ = kn.merge_statistics(states, [10, 30], local=True)
    assert list(shared) == ["linear.weight", "linear.bias"]


@variants
def test_prepare_export(name):
    model = net(name).eval()
    expected = model(X)
    prepared, report = kn.prepare_export(model)
    assert report.rows[0]["was"] == f"kn.{name}"
    torch.testing.assert_close(prepared(X), expected)
    with pytest.raises(ValueError, match="is in training mode"):
        kn.prepare_export(net(name).train())


def test_what_is_not_ready_says_so():
    with pytest.raises(ValueError, match="has no reference batch"):
        kn.prepare_export(kn.VirtualBatchNorm(4).eval())


@variants
def test_a_state_dict_can_be_saved_and_loaded(name, tmp_path):
    """The state_dict's metadata say which statistics a layer keeps."""
    model = net(name)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert ("running_var" in state._metadata["bn"]) == ("scale" in own(name))
    other = net(name, 1)
    other.load_state_dict(state)
    assert is_unchanged(other, state_of(model))


class Own(kn.GhostBatchNorm):
    def normalize_running(self, x, residual, act):
        return super().normalize_running(x, residual, act) * 2


class Inherits(kn.GhostBatchNorm):
    """A subclass with another constructor only."""

    def __init__(self, num_features):
        super().__init__(num_features, 8)


def test_a_subclass_says_what_its_base_does_unless_it_computes_itself():
    for kind, folded in ((lambda: Own(4, 8), 0), (lambda: Inherits(4), 1)):
        model = nn.Sequential(nn.Linear(3, 4), kind()).eval()
        expected = copy.deepcopy(model)(X)
        changed, report = kn.fold(model, X)
        assert report.summary["folded"] == folded
        torch.testing.assert_close(changed(X), expected)
    assert (
        "kn.surgery.register(Own, ...)"
        in kn.fold(nn.Sequential(nn.Linear(3, 4), Own(4, 8)).eval(), X)[1].rows[0]["reason"]
    )
