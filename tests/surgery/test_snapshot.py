"""What surgery puts back: modules after an error, modes and gradients always."""

import pytest
import torch
from torch import fx, nn

import keelnorm as kn
from keelnorm.surgery.snapshot import all_or_nothing, in_evaluation, training_only


def a_net():
    return nn.Sequential(nn.Linear(3, 3), kn.BatchNorm1d(3), nn.ReLU())


def tables(module):
    return {name: list(value.items()) for name, value in vars(module).items() if isinstance(value, dict)}


def change_everything(model, error=None):
    linear, norm, _ = model
    norm.__class__ = nn.BatchNorm1d
    norm.momentum, norm.mine = 0.9, 3
    norm.register_forward_hook(lambda *_: None)
    norm.running_mean = torch.ones(3)
    linear.weight = nn.Parameter(torch.ones(3, 3))
    linear.bias = None
    model[2] = nn.Tanh()
    del model._modules["0"]
    norm.running_var.fill_(7)
    if error is not None:
        raise error


def test_modules_and_values_are_put_back_after_an_error():
    model = a_net()
    modules = list(model.modules())
    before = [(type(m), dict(vars(m)), tables(m)) for m in modules]
    with pytest.raises(KeyboardInterrupt), all_or_nothing(modules, [model[1].running_var, None]):
        change_everything(model, KeyboardInterrupt())
    for module, (kind, attributes, contents) in zip(modules, before, strict=True):
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
        now = tables(module)
        assert now.keys() == contents.keys()
        for name, entries in contents.items():
            assert [key for key, _ in now[name]] == [key for key, _ in entries]
            assert all(a is b for (_, a), (_, b) in zip(now[name], entries, strict=True))
    assert model[1].running_var.tolist() == [1, 1, 1]


def test_nothing_is_put_back_without_an_error():
    model = a_net()
    norm = model[1]
    with all_or_nothing(model.modules(), [norm.running_var]):
        change_everything(model)
    assert type(norm) is nn.BatchNorm1d
    assert norm.mine == 3
    assert norm.running_var.tolist() == [7, 7, 7]


def test_a_graph_runs_as_before():
    model, x = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh())), torch.randn(5)
    expected = model(x)

    def change():
        graph = fx.Graph()
        graph.output(graph.placeholder("x"))
        model.graph = graph
        assert model(x) is x
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"), all_or_nothing(model.modules()):
        change()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_modes_are_put_back():
    model = a_net()
    model[1].eval()
    with in_evaluation(model):
        assert not any(module.training for module in model.modules())
        model[1].train()
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_gradients_are_put_back():
    model = a_net()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = grad = torch.ones(3, 3)
    with training_only([model[1].weight], model):
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, False]
        model[1].weight.grad = torch.ones(3)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert model[0].weight.grad is grad
    assert model[1].weight.grad is None
