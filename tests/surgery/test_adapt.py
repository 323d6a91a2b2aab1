"""Adapted statistics follow the papers' formulas, entropy falls, and adaptation can be undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn


def a_net(dtype=torch.float64):
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
        nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for layer in (model[1], model[6]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.uniform_(0.5, 2)
    return model.eval()


def moments(x):
    rows = x.movedim(1, -1).flatten(0, -2)
    return rows.mean(0), rows.var(0)


DATA = torch.randn(24, 2, 6, 6, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("prior", [0, 16, 1e6, float("inf")])
def test_the_formula(prior):
    source, model = a_net(), a_net()
    model, report = kn.adapt(model, list(DATA.split(10)), prior=prior, where="1")
    share = 1.0 if prior == float("inf") else prior / (prior + 24)
    mean, var = moments(source[0](DATA).detach())
    torch.testing.assert_close(model[1].running_mean, source[1].running_mean * share + mean * (1 - share))
    torch.testing.assert_close(model[1].running_var, source[1].running_var * share + var * (1 - share))
    assert report.rows[0]["source weight"] == pytest.approx(share)
    assert report.rows[0]["samples"] == 24
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[6].running_mean, source[6].running_mean)


def test_sequential_adaptation():
    """The second layer's target statistics are taken with the first layer already adapted."""
    source, model = a_net(), a_net()
    model, _ = kn.adapt(model, [DATA], prior=8, sequential=True)
    x = source[0](DATA)
    mean, var = moments(x.detach())
    mean, var = (s * 0.25 + t * 0.75 for s, t in ((source[1].running_mean, mean), (source[1].running_var, var)))
    x = F.batch_norm(x, mean, var, source[1].weight, source[1].bias, False, 0.0, source[1].eps)
    mean, _ = moments(source[2:6](x).detach())
    torch.testing.assert_close(model[6].running_mean, source[6].running_mean * 0.25 + mean * 0.75)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("prior", [0, 12])
def test_by_the_batch(prior, converted):
    source, model = a_net(), a_net()
    if converted:
        model, _ = kn.convert(model)
    before = copy.deepcopy(model.state_dict())
    model, report = kn.adapt(model, prior=prior, mode="batch")
    assert report.summary["layers"] == 2
    for batch in (DATA[:4], DATA[4:]):
        share, x = prior / (prior + len(batch)), batch
        for module in source.requires_grad_(False):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                rows = x.movedim(1, -1).flatten(0, -2)
                mean = module.running_mean * share + rows.mean(0) * (1 - share)
                var = module.running_var * share + rows.var(0, correction=0) * (1 - share)
                x = F.batch_norm(x, mean, var, module.weight, module.bias, False, 0.0, module.eps)
            else:
                x = module(x)
        torch.testing.assert_close(model(batch), x)
        torch.testing.assert_close(copy.deepcopy(model)(batch), x)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(batch), x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train()(DATA)
    assert model[1].num_batches_tracked == 1
    model, _ = kn.reset_adaptation(model.eval())
    torch.testing.assert_close(model(DATA), source(DATA))
    assert "forward" not in model[1].__dict__


def test_every_argument_of_the_call_by_the_batch():
    layer, x = kn.BatchNorm1d(1, eps=1e-12).double().eval(), torch.tensor([[0.0], [1.0], [5.0]]).double()
    layer, _ = kn.adapt(layer, mode="batch")
    weight = torch.tensor([1.0, 1.0, 8.0]).double()
    often = x.repeat_interleave(weight.long(), 0)
    torch.testing.assert_close(layer(x, sample_weight=weight), (x - 4.1) / often.std(correction=0))
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(layer(x, mask=mask, padding="keep").flatten().tolist(), [-1.0, 1.0, 5.0])


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_a_forward_on_the_instance_is_used_and_kept(library):
    layer, x = library.BatchNorm1d(5).double().eval(), torch.randn(8, 5).double()
    inner = layer.forward

    def around(x):
        return inner(x) * 2

    layer.forward = around
    for _ in range(2):
        layer, _ = kn.adapt(layer, mode="batch")
    torch.testing.assert_close(layer(x), 2 * F.batch_norm(x, None, None, training=True))
    layer, _ = kn.adapt(layer, [x])
    assert layer.forward is around
    layer, _ = kn.reset_adaptation(layer)
    assert layer.forward is around
    assert torch.equal(layer(x), around(x))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_reset_is_exact(way):
    model = a_net()
    before, attributes = copy.deepcopy(model.state_dict()), model[1].__dict__.keys()
    model, _ = kn.adapt(model, [DATA], prior=3, entropy=True)
    model, _ = kn.adapt(model, [DATA + 1], prior=3)  # from the same source
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    other = way(model)
    for each in (model, other):
        each, report = kn.reset_adaptation(each)
        assert report.summary == {"layers": 2}
        assert all(torch.equal(before[name], value) for name, value in each.state_dict().items())
        assert each[1].__dict__.keys() == attributes


def test_a_second_adaptation_starts_from_the_source():
    once, twice = a_net(), a_net()
    kn.adapt(once, [DATA], prior=4, where="1")
    kn.adapt(twice, [DATA * 3], prior=4, where="1")
    kn.adapt(twice, [DATA], prior=4, where="1")
    torch.testing.assert_close(once[1].running_var, twice[1].running_var)


def test_entropy_falls_and_nothing_else_changes():
    model = a_net()
    before = copy.deepcopy(model.state_dict())
    model[8].weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]

    def entropy(model):
        model = copy.deepcopy(model)
        kn.adapt(model, [DATA])
        log = model(DATA).log_softmax(1)
        return -(log.exp() * log).sum(1).mean().item()

    start = entropy(model)
    model, _ = kn.adapt(model, [DATA] * 20, entropy=lambda p: torch.optim.SGD(p, lr=0.1))
    assert entropy(model) < start - 0.02
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{i}.{name}" for i in (1, 6) for name in ("weight", "bias", "running_mean", "running_var")}
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("entropy", [False, True])
def test_an_exception_leaves_the_model_as_it_was(entropy):
    model = a_net().train()
    before, attributes = copy.deepcopy(model.state_dict()), dict(model[1].__dict__)
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("in the middle")
        return model(batch)

    with pytest.raises(KeyError, match="in the middle"):
        kn.adapt(model, [DATA, DATA], entropy=entropy, forward=forward)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model[1].__dict__ == attributes
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_errors():
    model = a_net()
    for arguments, options, kind, words in (
        ((model, [DATA]), {"prior": -1}, ValueError, "prior must be a number of samples"),
        ((model, [DATA]), {"mode": "online"}, ValueError, "mode must be"),
        ((model, [DATA]), {"mode": "batch"}, ValueError, "takes no loader"),
        ((model,), {}, TypeError, "loader must be an iterable"),
        ((model, []), {}, ValueError, "got no values"),
        ((model, iter([DATA])), {"entropy": True}, ValueError, "start again"),
        ((model[:2], [DATA]), {"entropy": True, "forward": lambda m, b: m(b).mean()}, TypeError, "needs logits"),
        ((nn.BatchNorm1d(3, affine=False), [torch.randn(4, 3)]), {"entropy": True}, ValueError, "have none"),
    ):
        with pytest.raises(kind, match=words):
            kn.adapt(*arguments, **options)


def test_moments_that_the_buffers_can_not_hold():
    model = nn.Sequential(kn.BatchNorm1d(2)).half()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"too large for its buffers of torch\.float16; the model is as before"):
        kn.adapt(model, [torch.tensor([[0.0, 300.0], [1.0, -300.0]]).half()])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
