"""Converted models with other tools: copy, pickle, compile, export, fx, DDP, SWA, functional calls."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from surgery.convert_models import a_net
from surgery.test_convert import assert_same_outcomes, fused_in, trained
from torch import fx, nn

import keelnorm as kn

X = torch.randn(4, 3, 8, 8)


@pytest.fixture
def pair():
    original = trained(a_net())
    return kn.convert(copy.deepcopy(original))[0], original


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_save], ids=lambda f: f.__name__)
def test_copies_are_models_of_their_own(pair, way):
    model, original = pair
    other = way(model)
    assert_same_outcomes(other, original, X, 1e-4)
    assert fused_in(other, X) == 5
    assert [fused_in(model.eval(), X) for _ in range(2)] == [0, 5]  # the copy has learned for itself
    third = way(other)
    other[1].weight.data.mul_(-2)
    other[3].act = nn.Tanh()
    assert_same_outcomes(third, original, X, 1e-4)
    assert fused_in(third.eval(), X) == fused_in(model, X) == 5
    kn.revert(other)
    assert type(other[1]) is nn.BatchNorm2d
    assert type(model[1]) is kn.BatchNorm2d


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(pair, training):
    model, original = pair
    model.train(training), original.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-4, atol=1e-5)
    compiled(X).sum().backward()
    model[3].act = nn.Tanh()
    original[3].act = nn.Tanh()
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-4, atol=1e-5)


def test_exports(pair):
    model, original = pair
    program = torch.export.export(model.eval(), (X,))
    torch.testing.assert_close(program.module()(X), original.eval()(X), rtol=1e-4, atol=1e-5)


def test_fx_sees_the_modules(pair):
    model, original = pair
    graph = fx.symbolic_trace(model)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == [node.target for node in fx.symbolic_trace(original).graph.nodes if node.op == "call_module"]


def test_functional_calls_and_transforms(pair):
    model, original = pair
    model.eval(), original.eval()
    parameters = {name: p.detach() for name, p in original.named_parameters()}

    def loss(net):
        return lambda p: torch.func.functional_call(net, p, (X,)).square().sum()

    found, wanted = (torch.func.grad(loss(net))(parameters) for net in (model, original))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3)


def test_averaged_models(pair):
    model, original = pair
    found, wanted = (torch.optim.swa_utils.AveragedModel(net).eval() for net in (model, original))
    torch.testing.assert_close(found(X), wanted(X), rtol=1e-4, atol=1e-5)
    assert fused_in(found, X) == 5


def test_control_over_statistics(pair):
    model, _ = pair
    kn.freeze(model)
    before = copy.deepcopy(model.state_dict())
    model.train()(X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    kn.unfreeze(model)
    with kn.pause_statistics(model):
        model(X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ddp(pair, tmp_path):
    model, original = pair
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.testing.assert_close(wrapped(X), original(X), rtol=1e-4, atol=1e-5)
        wrapped(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert fused_in(wrapped, X) == 5
        assert fused_in(wrapped.module, X) == 5
    finally:
        torch.distributed.destroy_process_group()
