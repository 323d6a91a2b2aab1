"""Paused layers normalize with the batch and leave their running statistics alone."""

import copy

import pytest
import torch
from control.models import KINDS, PATHS, Block, buffers, data, same
from torch import nn

import keelnorm as kn
from keelnorm.control import pause_statistics

every_kind = pytest.mark.parametrize(("rank", "kind"), KINDS, ids=[f"{kind}{rank}d" for rank, kind in KINDS])


@every_kind
def test_the_batch_normalizes_and_nothing_changes(rank, kind):
    model, x = Block(rank, kind), data(rank)
    model(x)
    before, state = buffers(model), list(model.state_dict())
    with pause_statistics(model) as paths:
        assert paths == PATHS
        paused = model(x)
        assert list(model.state_dict()) == state
        gradient = torch.autograd.grad(paused.square().sum(), model.first.weight)[0]
    assert same(buffers(model), before)
    y = model(x)
    assert torch.equal(paused, y)
    assert torch.equal(gradient, torch.autograd.grad(y.square().sum(), model.first.weight)[0])
    assert model.norm.num_batches_tracked.item() == 2


@every_kind
def test_evaluation_inside(rank, kind):
    model, x = Block(rank, kind), data(rank)
    model(x)
    expected = model.eval()(x)
    model.train()
    with pause_statistics(model):
        model.eval()
        assert torch.equal(model(x), expected)


def test_one_value_per_channel_by_the_running_statistics():
    """The policy needs the running statistics, which a paused layer still has."""
    layer, x = kn.BatchNorm1d(3, too_few="running"), torch.randn(1, 3)
    layer(data(1))
    before = buffers(layer)
    expected = copy.deepcopy(layer).eval()(x)
    with pause_statistics(layer):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(torch.cat([x, x + 1]), mask=torch.tensor([True, False]))[0], expected[0])
    layer.track_running_stats = False  # torch.nn's own way to pause
    assert torch.equal(layer(x), expected)
    assert same(buffers(layer), before)


@pytest.mark.parametrize("arguments", [{"activation": "elu", "inplace": True}, {"mask": torch.arange(12) > 3}], ids=str)
def test_the_same_bits_as_unpaused(arguments):
    layer, x = kn.BatchNorm2d(3), data(2)
    expected = copy.deepcopy(layer)(x.clone(), **arguments)
    with pause_statistics(layer), torch.no_grad():
        assert torch.equal(layer(x.clone(), **arguments), expected)
    assert layer.num_batches_tracked.item() == 0


def test_nested_and_after_an_exception():
    model, x = Block(2, "keelnorm"), data(2)
    with pause_statistics(model):
        with pause_statistics(model, where="norm") as paths:
            assert paths == ["norm"]
            model(x)
        model(x)
    assert model.norm.num_batches_tracked.item() == 0
    with pytest.raises(RuntimeError, match="stop"), pause_statistics(model):
        raise RuntimeError("stop")
    model(x)
    assert model.norm.num_batches_tracked.item() == model.last[0].num_batches_tracked.item() == 1


def test_blocks_that_overlap():
    layer = nn.BatchNorm1d(3)
    first, second = pause_statistics(layer), pause_statistics(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 0
    second.__exit__(None, None, None)
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 1


def test_where():
    model = Block(2, "torch")
    with pause_statistics(model, where="last"):
        model(data(2))
    assert (model.norm.num_batches_tracked.item(), model.last[0].num_batches_tracked.item()) == (1, 0)
    with pytest.raises(ValueError, match="pause_statistics: where='first' matches no batch norm"):
        pause_statistics(model, where="first").__enter__()


def test_as_a_decorator():
    model, x = Block(2, "keelnorm"), data(2)

    @pause_statistics(model)
    def teacher(x):
        return model(x)

    for _ in range(2):
        teacher(x)
    assert model.norm.num_batches_tracked.item() == 0
    model(x)
    assert model.norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_layers_that_track_nothing_stay_so(library):
    layer = library.BatchNorm1d(3, track_running_stats=False)
    switched_off = library.BatchNorm1d(3)
    switched_off.track_running_stats = False
    with pause_statistics(nn.Sequential(layer, switched_off)) as paths:
        assert paths == []
    assert not layer.track_running_stats
    assert not switched_off.track_running_stats


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch", "keelnorm"])
def test_compiled(kind):
    torch._dynamo.reset()
    model, x = Block(1, kind), data(1)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for count in (2, 3):
        before = buffers(model)
        with pause_statistics(compiled):
            y = compiled(x)
        assert same(buffers(model), before)
        assert torch.allclose(y, compiled(x))
        assert model.norm.num_batches_tracked.item() == count


def test_sharpness_aware_minimization():
    """Foret et al. (2021), arXiv:2010.01412, algorithm 1: the second forward, at perturbed weights, must not count."""

    def loss_of(model, x):
        return model(x).square().mean()

    model, counted, x = Block(2, "keelnorm"), Block(2, "keelnorm"), data(2)
    counted.load_state_dict(model.state_dict())
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss_of(model, x), parameters)
    norm = torch.stack([g.norm() for g in gradient]).norm()
    steps = [0.5 * g / norm for g in gradient]
    with torch.no_grad():
        for p, step in zip(parameters, steps, strict=True):
            p.add_(step)
    with pause_statistics(model):
        loss_of(model, x).backward()
    with torch.no_grad():
        for p, step in zip(parameters, steps, strict=True):
            p.sub_(step)
    loss_of(counted, x)
    assert same(buffers(model), buffers(counted))
    assert any(not torch.allclose(p.grad, g) for p, g in zip(parameters, gradient, strict=True))
