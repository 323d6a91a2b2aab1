"""Converted models compute what they did, with one call for what follows a batch norm, and are the model they were."""

from __future__ import annotations

import copy

import pytest
import torch
from surgery.convert_models import FORMS, UNFUSED, Block, HardSwish, NotSwish, OneLayer, Swish, a_net
from torch import nn

import evenkeel as ek


def trained(model):
    """The model with parameters and running moments that are not those of the beginning."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def outcome(model, x, training):
    model.train(training)
    leaves = [x.clone().requires_grad_(), *model.parameters()]
    y = model(leaves[0])
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return {"y": y, **{str(i): g for i, g in enumerate(gradients) if g is not None}, **dict(model.state_dict())}


def assert_same_outcomes(model, original, x, tolerance=1e-10):
    for training in (True, False):
        found, wanted = outcome(model, x, training), outcome(original, x, training)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def calls_of(model, x):
    """How often each batch norm is called with an activation or a residual: what has really been fused."""
    seen = []
    layers = {m: p for p, m in model.named_modules() if isinstance(m, ek.nn.batch_norm.FusedBatchNorm)}
    plain = ek.nn.batch_norm.FusedBatchNorm.forward

    def spy(self, x, residual=None, **keywords):
        seen.append((layers[self], keywords.get("activation"), residual is not None))
        return plain(self, x, residual, **keywords)

    ek.nn.batch_norm.FusedBatchNorm.forward = spy
    try:
        with torch.no_grad():
            model(x)
    finally:
        ek.nn.batch_norm.FusedBatchNorm.forward = plain
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_fused(form):
    then, activation, residual = FORMS[form]
    original = trained(OneLayer(then).double())
    model, report = ek.convert(copy.deepcopy(original))
    (row,) = report.rows
    assert row["path"] == "bn"
    assert row["reason"] is None
    assert ("addition" in row["runs with"]) == residual
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    # torch's own derivative of hardsigmoid takes a sixth in float32.
    assert_same_outcomes(model, original, x, 1e-7 if activation == "hardsigmoid" else 1e-10)
    ((_, called_with, had_residual),) = calls_of(model, x)
    broadcast = "one value" in form  # there the addition runs by itself
    assert had_residual == (residual and not broadcast)
    name = getattr(called_with, "name", called_with)
    assert (name or "none") == ("none" if broadcast else activation)


@pytest.mark.parametrize("form", UNFUSED)
def test_what_is_not_fused(form):
    original = trained(OneLayer(UNFUSED[form]).double())
    model, report = ek.convert(copy.deepcopy(original))
    assert report.rows[0]["runs with"] is None
    assert "forward" not in model.__dict__
    assert_same_outcomes(model, original, torch.randn(4, 3, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.LeakyReLU(0.3), "leaky_relu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.Softplus(2.0, 10.0), "softplus"),
        (Swish(), "silu"),
        (HardSwish(), "hardswish"),
        (NotSwish(), None),
        (nn.PReLU(), None),
        (nn.Sequential(nn.Identity(), nn.SiLU()), None),
    ],
    ids=str,
)
def test_activation_modules(activation, name):
    original = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), activation).double())
    model, report = ek.convert(copy.deepcopy(original))
    runs_with = report.rows[0]["runs with"]
    assert (runs_with is None) if name is None else runs_with.startswith(name)
    assert_same_outcomes(model, original, torch.randn(4, 3, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_between(p):
    """It is passed over where it does nothing: always, or in evaluation."""
    original = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(p), nn.ReLU()).double())
    model, _ = ek.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert calls_of(model.eval(), x) == [("0", "relu", False)]
    assert calls_of(model.train(), x) == [("0", "relu" if p == 0 else None, False)]
    original.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), original.eval()(x))
    model.eval()[1].train()  # evaluation, with dropout as in training
    assert calls_of(model, x) == [("0", "relu" if p == 0 else None, False)]
    model.eval()[1].p = 0.25
    assert calls_of(model, x) == [("0", None, False)]


def test_blocks_across_modules():
    original = trained(a_net().double())
    model, report = ek.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_outcomes(model, original, x)
    rows = {row["path"]: row["runs with"] for row in report.rows}
    # The block's second batch norm takes the shortcut's as its residual, or the other way round.
    assert rows == {
        "1": "relu (2)",
        "3.body.1": "relu (3.body.2)",
        "3.body.4": "addition and relu (3.act)",
        "4.body.1": "relu (4.body.2)",
        "4.body.4": "addition and relu (4.act)",
        "4.down.1": None,
    }
    fused = [call for call in calls_of(model.eval(), x) if call[1] or call[2]]
    assert fused == [
        ("1", "relu", False), ("3.body.1", "relu", False), ("3.body.4", "relu", True), ("4.body.1", "relu", False),
        ("4.body.4", "relu", True),
    ]  # fmt: skip


def test_the_model_stays_what_it_was():
    model = a_net()
    hooked = []
    model[3].body[1].register_forward_hook(lambda *_: hooked.append(1))
    layers = dict(model.named_modules())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    keys, mode = list(model.state_dict()), model.eval()[4].down[1].training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted, _ = ek.convert(model)
    assert converted is model
    assert all(module is layers[path] for path, module in model.named_modules())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert {id(b) for b in buffers} <= {id(b) for b in model.buffers()}
    assert list(model.state_dict()) == keys
    assert model[4].down[1].training is mode
    assert isinstance(model[1], nn.BatchNorm2d)
    assert type(model[3]) is Block
    x = torch.randn(2, 3, 8, 8)
    model.train()(x).sum().backward()
    before = model[1].weight.clone()
    optimizer.step()
    assert not torch.equal(before, model[1].weight)
    assert hooked == [1]


def test_patterns_and_no_fusing():
    model, report = ek.convert(a_net(), where="4.*")
    kinds = {path: type(m) for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert [path for path, kind in kinds.items() if kind is ek.BatchNorm2d] == ["4.body.1", "4.body.4", "4.down.1"]
    assert [row["path"] for row in report.rows] == ["4.body.1", "4.body.4", "4.down.1"]
    assert "forward" in model[4].__dict__
    assert "forward" not in model[3].__dict__
    model, report = ek.convert(a_net(), fuse=False)
    assert report.summary["converted"] == 6
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert report.summary["fused"] == 0


def test_twice_is_once():
    model, _ = ek.convert(a_net())
    forward = model[3].__dict__["forward"].code
    model, report = ek.convert(model)
    assert report.summary["converted"] == 0
    assert report.summary["fused"] == 5
    assert model[3].__dict__["forward"].code == forward


@pytest.mark.parametrize("converted_twice", [False, True])
def test_revert(converted_twice):
    original = a_net()
    keys = [dict(module.__dict__) for module in original.modules()]
    buffers = [dict(module._buffers) for module in original.modules()]
    model, _ = ek.convert(original)
    if converted_twice:
        model, _ = ek.convert(model, sync=True)
    model, report = ek.revert(model)
    assert report.summary["layers"] == 6
    for module, attributes, of_module in zip(model.modules(), keys, buffers, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[name] is value for name, value in attributes.items())
        assert module._buffers == of_module
        assert not module._non_persistent_buffers_set
        assert not type(module).__module__.startswith("evenkeel")
    assert ek.revert(model)[1].rows == []


def test_sync():
    model, report = ek.convert(a_net(), sync=True)
    assert {row["is"] for row in report.rows} == {"ek.SyncBatchNorm"}
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()
    model, _ = ek.convert(model, sync=False)
    assert {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {ek.BatchNorm}
    ek.revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert "process_group" not in model[1].__dict__
    synced, _ = ek.convert(nn.Sequential(nn.SyncBatchNorm(3, process_group=None), nn.ReLU()))
    assert type(synced[0]) is ek.SyncBatchNorm
    ek.revert(synced)
    assert type(synced[0]) is nn.SyncBatchNorm
    assert "process_group" in synced[0].__dict__


def test_lazy_layers_and_a_layer_alone():
    model, _ = ek.convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))
    assert type(model[0]) is ek.LazyBatchNorm2d
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert type(model[0]) is ek.BatchNorm2d
    layer, report = ek.convert(nn.BatchNorm1d(3))
    assert type(layer) is ek.BatchNorm1d
    assert report.rows[0]["path"] == ""


def test_the_report():
    _, report = ek.convert(a_net())
    text = str(report)
    assert text.startswith("convert: batch norms 6, converted 6, fused 5")
    assert "addition and relu (3.act)" in text
    assert report.to_dict()["rows"][0]["is"] == "ek.BatchNorm2d"
