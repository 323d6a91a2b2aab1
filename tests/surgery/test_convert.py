"""Converted models compute the same, with fused kernels, and keep their parameters, hooks and names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from surgery.convert_models import FORMS, UNFUSED, Block, HardSwish, NotSwish, OneLayer, Swish, a_net
from torch import nn

import keelnorm as kn
from keelnorm.engine.fusion import pending as fusion


def trained(model):
    """Give the model random parameters and running statistics."""
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


def assert_same_outcomes(model, original, x, tolerance=1e-10, runs=3):
    """Compare several runs in each mode; return the number of fused kernels per run in training, and in evaluation."""
    fused: dict[bool, list[int]] = {True: [], False: []}
    for training in (True, False):
        for _ in range(runs):
            before = fusion.completed
            found = outcome(model, x, training)
            fused[training].append(fusion.completed - before)
            wanted = outcome(original, x, training)
            assert found.keys() == wanted.keys()
            assert type(found["y"]) is torch.Tensor
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=f"{name}{{}}".format)
    return fused[True], fused[False]


def fused_in(model, x):
    """The number of fused kernels in one call without gradients."""
    before = fusion.completed
    with torch.no_grad():
        model(x)
    return fusion.completed - before


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_fused(form):
    then, runs_with = FORMS[form]
    original = trained(OneLayer(then).double())
    model, report = kn.convert(copy.deepcopy(original))
    (row,) = report.rows
    assert (row["path"], row["runs with"], row["reason"]) == ("bn", None, "has not been called yet")
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    # torch's own derivative of hardsigmoid takes a sixth in float32.
    fused = assert_same_outcomes(model, original, x, 1e-7 if "hardsigmoid" in runs_with else 1e-10)
    assert fused == ([0, 1, 1], [0, 1, 1])  # the first call of each mode learns
    (row,) = report.rows
    assert (row["runs with"], row["reason"]) == (runs_with, None)
    assert fused_in(model, x) == 1


@pytest.mark.parametrize("form", UNFUSED)
def test_what_is_not_fused(form):
    then, reason = UNFUSED[form]
    original = trained(OneLayer(then).double())
    model, report = kn.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    fused = assert_same_outcomes(model, original, x)
    assert [counts[-1] for counts in fused] == [0, 0]
    assert report.rows[0]["runs with"] is None
    assert report.rows[0]["reason"].startswith(reason)
    assert fused_in(model, x) == 0


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
        (nn.Sequential(nn.Identity(), nn.SiLU()), "silu"),
        (NotSwish(), None),
        (nn.PReLU(), None),
    ],
    ids=str,
)
def test_activation_modules(activation, name):
    original = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), activation).double())
    model, report = kn.convert(copy.deepcopy(original))
    fused = assert_same_outcomes(model, original, torch.randn(4, 3, 5, 5, dtype=torch.float64))
    assert fused == (([0, 1, 1], [0, 1, 1]) if name else ([0, 0, 0], [0, 0, 0]))
    assert report.rows[0]["runs with"] == name


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_between(p):
    """A module that does nothing, always or in evaluation, does not prevent fusing."""
    original = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(p), nn.ReLU()).double())
    model, _ = kn.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert [fused_in(model.eval(), x) for _ in range(3)] == [0, 1, 1]
    torch.testing.assert_close(model(x), original.eval()(x))
    model.train(), original.train()
    for count in (0, int(p == 0), int(p == 0)):
        state = torch.get_rng_state()
        with torch.no_grad():
            wanted = original(x)
        torch.set_rng_state(state)
        before = fusion.completed
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)
        assert fusion.completed - before == count
    assert fused_in(model.eval(), x) == 1
    model[1].p = original.eval()[1].p = 0.25  # does nothing in evaluation
    assert fused_in(model, x) == 1
    model[1].train(), original[1].train()  # evaluation, with dropout as in training
    state = torch.get_rng_state()
    wanted = original(x)
    torch.set_rng_state(state)
    torch.testing.assert_close(model(x), wanted)
    assert fused_in(model, x) == 0


def test_blocks_across_modules():
    original = trained(a_net().double())
    model, report = kn.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert assert_same_outcomes(model, original, x) == ([0, 5, 5], [0, 5, 5])
    # The block's second batch norm takes the shortcut's as its residual.
    assert {row["path"]: row["runs with"] for row in report.rows} == {
        "1": "relu",
        "3.body.1": "relu",
        "3.body.4": "addition and relu",
        "4.body.1": "relu",
        "4.body.4": "addition and relu",
        "4.down.1": None,
    }
    assert report.rows[-1]["reason"] == "it is added to the result of another batch norm"


def test_the_model_stays_what_it_was():
    model = a_net()
    hooked = []
    model[3].body[1].register_forward_hook(lambda *_: hooked.append(1))
    layers = dict(model.named_modules())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    keys, mode = list(model.state_dict()), model.eval()[4].down[1].training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted, _ = kn.convert(model)
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
    x = torch.randn(2, 3, 8, 8)
    model, report = kn.convert(a_net(), where="4.*")
    kinds = {path: type(m) for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert [path for path, kind in kinds.items() if kind is kn.BatchNorm2d] == ["4.body.1", "4.body.4", "4.down.1"]
    assert [row["path"] for row in report.rows] == ["4.body.1", "4.body.4", "4.down.1"]
    assert [fused_in(model, x) for _ in range(3)] == [0, 2, 2]
    model, report = kn.convert(a_net(), fuse=False)
    assert report.summary["converted"] == 6
    assert [fused_in(model, x) for _ in range(3)] == [0, 0, 0]
    assert report.summary["fused"] == 0
    assert {(row["runs with"], row["reason"]) for row in report.rows} == {(None, None)}


def test_twice_is_once():
    x = torch.randn(2, 3, 8, 8)
    model, first = kn.convert(a_net())
    fused_in(model, x)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    model, report = kn.convert(model)
    assert report.summary["converted"] == 0
    assert report.summary["fused"] == first.summary["fused"] == 5  # what was learned is kept
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert fused_in(model, x) == 5


@pytest.mark.parametrize("converted_twice", [False, True])
def test_revert(converted_twice):
    original = a_net()
    keys = [dict(module.__dict__) for module in original.modules()]
    buffers = [dict(module._buffers) for module in original.modules()]
    model, _ = kn.convert(original)
    fused_in(model, torch.randn(2, 3, 8, 8))
    if converted_twice:
        model, _ = kn.convert(model, sync=True)
    model, report = kn.revert(model)
    assert report.summary["layers"] == 6
    for module, attributes, of_module in zip(model.modules(), keys, buffers, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[name] is value for name, value in attributes.items())
        assert module._buffers == of_module
        assert not module._non_persistent_buffers_set
        assert not {**module._forward_hooks, **module._forward_pre_hooks, **module._forward_hooks_always_called}
        assert not type(module).__module__.startswith("keelnorm")
    assert kn.revert(model)[1].rows == []
    assert fused_in(model, torch.randn(2, 3, 8, 8)) == 0


def test_sync():
    model, report = kn.convert(a_net(), sync=True)
    assert {row["is"] for row in report.rows} == {"kn.SyncBatchNorm"}
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()
    model, _ = kn.convert(model, sync=False)
    assert {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {kn.BatchNorm2d}
    kn.revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert "process_group" not in model[1].__dict__
    synced, _ = kn.convert(nn.Sequential(nn.SyncBatchNorm(3, process_group=None), nn.ReLU()))
    assert type(synced[0]) is kn.SyncBatchNorm
    synced, _ = kn.revert(synced)
    assert type(synced[0]) is nn.SyncBatchNorm
    assert "process_group" in synced[0].__dict__


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, kn.BatchNorm2d, kn.BatchNorm])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_synchronized_layer_is_again_what_it_was(kind, by_hand):
    """A layer made by kn.SyncBatchNorm's conversion gets its class back; of torch.nn's conversion nothing is known."""
    model: Any = nn.Sequential(kind(3))
    model = kn.SyncBatchNorm.convert_sync_batchnorm(model) if by_hand else kn.convert(model, sync=True)[0]
    assert type(model[0]) is kn.SyncBatchNorm
    model, _ = kn.convert(copy.deepcopy(model), sync=False)
    assert type(model[0]) is getattr(kn, kind.__name__)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    assert type(kn.convert(model, sync=False)[0][0]) is kn.BatchNorm


def test_lazy_layers_and_a_layer_alone():
    model, _ = kn.convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))
    assert [type(layer) for layer in model] == [kn.LazyBatchNorm2d, nn.ReLU]
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert type(model[0]) is kn.BatchNorm2d
    kn.revert(model)
    assert type(model[0]) is nn.BatchNorm2d  # the class that torch.nn's lazy layer becomes
    layer, report = kn.convert(nn.BatchNorm1d(3))
    assert type(layer) is kn.BatchNorm1d
    assert report.rows[0]["path"] == ""


def test_a_part_called_alone():
    """Results wait inside the call of a child too; a child and a single layer return plain tensors."""
    original = trained(a_net().double())
    model, _ = kn.convert(copy.deepcopy(original))
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for _ in range(3):
        assert_same_outcomes(model[3], original[3], x)
        assert_same_outcomes(model[3].body, original[3].body, x)
        assert_same_outcomes(model[1], original[1], x)
    assert fused_in(model[3], x) == 2
    assert fused_in(model[1], x) == 0


def test_the_report_follows_the_model():
    model, report = kn.convert(a_net())
    assert str(report).startswith("convert: batch norms 6, converted 6, fused 0, left with a reason 0")
    assert str(report).count("has not been called yet") == 6
    model(torch.randn(2, 3, 8, 8))
    text = str(report)
    assert text.startswith("convert: batch norms 6, converted 6, fused 5")
    assert text.count("addition and relu") == 2
    assert report.to_dict()["rows"][0] == {
        "path": "1", "was": "BatchNorm2d", "is": "kn.BatchNorm2d", "runs with": "relu", "reason": None,
    }  # fmt: skip
    assert report.to_dict()["summary"] == dict(report.summary)
