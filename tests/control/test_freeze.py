"""Frozen layers stay as they are, whatever the training loop does."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from control.models import KINDS, PATHS, Block, buffers, data, same
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import keelnorm as kn
from keelnorm.control import Frozen, assert_frozen, freeze, frozen, pause_statistics, unfreeze
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.call import all_sizes_wait

every_kind = pytest.mark.parametrize(("rank", "kind"), KINDS, ids=[f"{kind}{rank}d" for rank, kind in KINDS])


def freeze_and_give(model):
    freeze(model)
    return model


def train(model, rank, steps, per_epoch=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for number in range(steps):
        if number % per_epoch == 0:
            model.train()
        optimizer.zero_grad()
        model(data(rank)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def warm(rank, kind):
    """A model that has seen data, with an optimizer's momentum to come."""
    model = Block(rank, kind)
    train(model, rank, 3)
    return model


@every_kind
def test_a_hundred_steps_change_nothing(warm, rank):
    before = buffers(warm)
    norms = [warm.norm, warm.last[0]]
    parameters = [p.clone() for norm in norms for p in norm.parameters()]
    other = warm.first.weight.clone()
    assert freeze(warm) == PATHS
    train(warm, rank, 100)
    assert same(buffers(warm), before)
    assert all(torch.equal(p, q) for p, q in zip(parameters, [p for n in norms for p in n.parameters()], strict=True))
    assert not torch.equal(warm.first.weight, other)
    assert_frozen(warm)
    unfreeze(warm)
    train(warm, rank, 1)
    assert not same(buffers(warm), before)
    assert not torch.equal(parameters[0], norms[0].weight)


@every_kind
def test_an_optimizer_with_momentum_and_old_gradients(warm, rank):
    """Freezing between backward and step: neither the gradient nor the momentum moves a frozen parameter."""
    optimizer = torch.optim.SGD(warm.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        warm(data(rank)).square().mean().backward()
        optimizer.step()
    before = warm.norm.weight.clone()
    freeze(warm, statistics=False)
    optimizer.step()
    assert torch.equal(warm.norm.weight, before)


@every_kind
def test_it_normalizes_with_the_running_statistics(warm, rank):
    x = data(rank)
    expected = warm.eval()(x)
    freeze(warm.train())
    assert torch.equal(warm.train()(x), expected)
    assert warm.training
    assert not warm.norm.training


@every_kind
def test_statistics_alone(warm, rank):
    before = buffers(warm)
    freeze(warm, affine=False)
    weight = warm.norm.weight.clone()
    train(warm, rank, 2)
    assert same(buffers(warm), before)
    assert not torch.equal(warm.norm.weight, weight)
    assert frozen(warm) == dict.fromkeys(PATHS, Frozen(statistics=True, affine=False))


@every_kind
def test_affine_alone(warm, rank):
    before = buffers(warm)
    freeze(warm, statistics=False)
    weight = warm.norm.weight.clone()
    train(warm, rank, 2)
    assert not same(buffers(warm), before)
    assert torch.equal(warm.norm.weight, weight)
    assert warm.norm.weight.grad is None
    assert frozen(warm) == dict.fromkeys(PATHS, Frozen(statistics=False, affine=True))


@every_kind
def test_state_dict_stays(warm):
    before = {name: value.clone() for name, value in warm.state_dict().items()}
    freeze(warm)
    after = warm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def copies_of(model):
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)]


@every_kind
def test_copies_are_frozen_by_themselves(warm, rank):
    freeze(warm)
    for other in copies_of(warm):
        assert_frozen(other)
        before = buffers(other)
        train(other, rank, 2)
        assert same(buffers(other), before)
        assert other.norm.train() is other.norm
        unfreeze(other)
        assert other.norm.training
        assert other.norm.weight.requires_grad
        assert_frozen(warm)
        train(other, rank, 1)
        assert not same(buffers(other), before)


@every_kind
def test_twice_is_once(warm):
    freeze(warm)
    freeze(warm)
    assert_frozen(warm)
    unfreeze(warm)
    assert frozen(warm) == dict.fromkeys(PATHS, Frozen(statistics=False, affine=False))
    assert unfreeze(warm) == PATHS
    assert "train" not in vars(warm.norm)
    assert "reset_running_stats" not in vars(warm.norm)


@every_kind
@pytest.mark.parametrize("asked", [True, False])
def test_the_mode_after_unfreezing_is_the_one_last_asked_for(warm, asked):
    freeze(warm.train(not asked))
    unfreeze(warm)
    assert warm.norm.training is not asked
    freeze(warm)
    freeze(warm.train(asked))
    unfreeze(warm)
    assert warm.norm.training is asked


@every_kind
def test_what_was_off_before_stays_off(warm):
    warm.norm.weight.requires_grad_(False)
    freeze(warm)
    unfreeze(warm, statistics=False)
    assert [p.requires_grad for p in warm.norm.parameters()] == [False, True]
    assert frozen(warm)["norm"] == Frozen(statistics=True, affine=False)
    assert all(p.requires_grad for p in warm.first.parameters())


def test_a_parameter_that_trains_again_is_frozen_by_a_second_call():
    layer = nn.BatchNorm1d(3)
    freeze(layer)
    layer.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match=r"the layer itself \(affine: weight with requires_grad=True\)"):
        assert_frozen(layer)
    freeze(layer)
    assert_frozen(layer)
    unfreeze(layer)
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_a_parametrized_weight():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = kn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Double())
    freeze(layer)
    assert not layer.weight.requires_grad
    unfreeze(layer)
    assert layer.weight.requires_grad


def test_where():
    model = nn.ModuleDict({"stem": Block(2, "torch"), "stem2": Block(2, "keelnorm")})
    everything = ["stem.norm", "stem.last.0", "stem2.norm", "stem2.last.0"]
    assert freeze(model) == everything
    unfreeze(model)
    assert freeze(model, where="stem") == ["stem.norm", "stem.last.0"]
    assert [f.statistics for f in frozen(model).values()] == [True, True, False, False]
    assert freeze(model, where="*.norm") == ["stem.norm", "stem2.norm"]
    assert freeze(model, where=["stem2.l*", "stem.norm"]) == ["stem.norm", "stem2.last.0"]
    assert_frozen(model, where=["stem", "stem2"])
    assert unfreeze(model, where="stem?.*") == ["stem2.norm", "stem2.last.0"]
    assert frozen(model, where="stem2.norm") == {"stem2.norm": Frozen(statistics=False, affine=False)}
    assert freeze(model["stem"].norm) == [""]


def test_a_layer_in_two_places_is_meant_by_either_path():
    model = nn.ModuleDict()
    model["a"] = model["b"] = nn.BatchNorm1d(3)
    assert freeze(model) == ["a"]
    assert unfreeze(model, where="b") == ["b"]
    assert frozen(model) == {"a": Frozen(statistics=False, affine=False)}


@pytest.mark.parametrize("function", [freeze, unfreeze, frozen, assert_frozen])
def test_errors(function):
    model = Block(2, "torch")
    with pytest.raises(ValueError, match=r"where='layer9\.\*' matches no batch norm.*'norm', 'last\.0'"):
        function(model, where=["norm", "layer9.*"])
    with pytest.raises(ValueError, match="The model has none"):
        function(nn.Linear(3, 3), where="bn")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got 3 \(int\)"):
        function(3)
    for where, came in (([3], r"3 \(int\)"), (3, r"3 \(int\)"), (b"norm", r"110 \(int\)"), (model.norm, "BatchNorm2d")):
        with pytest.raises(TypeError, match=rf"{function.__name__}: where takes a pattern .* got {came}"):
            function(model, where=where)
    with pytest.raises(
        TypeError, match=rf"{function.__name__}: where is called with a path and its layer, but .* does not take these"
    ):
        function(model, where=lambda path: True)
    with pytest.raises(ValueError, match=rf"{function.__name__}: where selects no batch norm\. .*'norm', 'last\.0'"):
        function(model, where=lambda path, layer: False)
    with pytest.raises(ValueError, match=rf"{function.__name__}: where=\[\] has no pattern"):
        function(model, where=[])
    assert frozen(model) == dict.fromkeys(PATHS, Frozen(statistics=False, affine=False))


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_no_running_statistics(library):
    model = nn.Sequential(library.BatchNorm1d(3), library.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"freeze: 1 has no running statistics .*statistics=False"):
        freeze(model)
    assert frozen(model)["0"] == Frozen(statistics=False, affine=False)
    assert freeze(model, statistics=False) == ["0", "1"]
    assert freeze(model, where="0") == ["0"]
    with pytest.raises(
        AssertionError, match=r"1 of 2 batch norms are not frozen: 1 \(statistics: there are no running"
    ):
        assert_frozen(model)


def test_a_lazy_layer_has_nothing_to_freeze_yet():
    layer = nn.LazyBatchNorm1d()
    with pytest.raises(ValueError, match="the layer itself is lazy"):
        freeze(layer)
    layer(torch.randn(4, 3))
    freeze(layer)
    assert_frozen(layer.train())


class Stubborn(nn.BatchNorm2d):
    """Its train() raises when it is told to."""

    raises = False

    def train(self, mode=True):
        super().train(mode)
        if self.raises:
            raise RuntimeError("no")
        return self


def all_that_freezing_touches(model):
    """Of each module: what is set on it, the mode that is remembered, and what its parameters require and have."""
    names = ("train", "reset_running_stats", "training", "_frozen_parameters")
    return [
        (
            {name: value for name, value in vars(module).items() if name in names},
            getattr(vars(module).get("train"), "mode", None),
            [(parameter.requires_grad, id(parameter.grad)) for parameter in module.parameters()],
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("function", [freeze, unfreeze])
@pytest.mark.parametrize("before", [{}, {"affine": False}, {"affine": True}], ids=["thawed", "in part", "frozen"])
def test_nothing_stays_half_done(function, before):
    # A split layer asks the layers in it for the mode that it is asked for.
    model = nn.Sequential(nn.BatchNorm2d(3), kn.SplitBatchNorm(3), Stubborn(3), nn.BatchNorm2d(3))
    if before:
        freeze(model, **before)
    if function is unfreeze and not before:
        freeze(model, where="2")  # or the stubborn layer would not be asked for anything
    for parameter in model.parameters():
        parameter.grad = torch.ones(3)
    expected = all_that_freezing_touches(model.train())
    vars(model[2])["raises"] = True
    with pytest.raises(RuntimeError, match="no"):
        function(model)
    assert all_that_freezing_touches(model) == expected


def test_an_assignment_to_training_is_found():
    layer = freeze_and_give(nn.BatchNorm1d(3))
    layer.training = True
    with pytest.raises(AssertionError, match="training was set to True by assignment"):
        assert_frozen(layer)
    freeze(layer)
    assert_frozen(layer)


@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
@pytest.mark.parametrize("early", [True, False], ids=["frozen first", "compiled first"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(kind, early):
    torch._dynamo.reset()
    model = Block(1, kind)
    x = data(1)
    if early:
        freeze(model)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(x)
    compiled(x)
    freeze(model)
    before = buffers(model)
    compiled.train()
    y = compiled(x)
    assert same(buffers(model), before)
    assert torch.allclose(y, model.eval()(x))
    unfreeze(compiled)
    compiled.train()
    compiled(x)
    assert model.norm.num_batches_tracked.item() == before["norm.num_batches_tracked"].item() + 1


def test_sequential_stays_fused():
    net = freeze_and_give(kn.Sequential(kn.BatchNorm2d(3), nn.ReLU())).train()
    with all_sizes_wait():
        net(torch.randn(4, 3, 5, 5))  # the layer learns what follows it
        before = pending.completed
        assert (net(torch.randn(4, 3, 5, 5)) >= 0).all()
    assert pending.completed == before + 1


@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
class TestAveraging:
    def test_average_of_a_frozen_model(self, kind):
        for keywords in ({}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True}):
            model = Block(2, kind)
            train(model, 2, 2)
            freeze(model)
            averaged = AveragedModel(model, **keywords)
            before = buffers(model)
            for _ in range(3):
                train(model, 2, 1)
                averaged.update_parameters(model)
            assert same(buffers(averaged.module), before)
            assert_frozen(averaged)
            assert torch.equal(averaged.module.norm.weight, model.norm.weight)

    def test_update_bn_passes_over_frozen_layers(self, kind):
        model = Block(2, kind)
        train(model, 2, 2)
        freeze(model, where="norm")
        averaged = AveragedModel(model)
        for _ in range(2):
            train(model, 2, 1)
            averaged.update_parameters(model)
        before = buffers(averaged.module)
        batches = [data(2) for _ in range(3)]
        update_bn(batches, averaged)
        after = buffers(averaged.module)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"last.0.running_mean", "last.0.running_var", "last.0.num_batches_tracked"}
        assert after["last.0.num_batches_tracked"].item() == 3
        module = averaged.module.eval()
        inputs = [module.second(torch.relu(module.norm(module.first(x)))).detach() for x in batches]
        expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(after["last.0.running_mean"], expected, rtol=1e-5, atol=1e-5)


def test_frozen_inside_pause():
    model = Block(2, "keelnorm")
    freeze(model)
    x = data(2)
    expected = model(x)
    with pause_statistics(model):
        assert torch.equal(model(x), expected)


def test_methods_set_on_the_instance_come_back():
    """As people set train() to keep a layer in evaluation."""
    layer, asked = nn.BatchNorm1d(3), []

    def train(mode=True):
        asked.append(mode)
        return layer

    vars(layer).update(train=train, reset_running_stats=lambda: asked.append("reset"))
    kept = dict(vars(layer))
    for _ in range(2):
        freeze(layer)
    layer.train()
    layer.reset_running_stats()
    assert asked == []
    assert not layer.training
    unfreeze(layer)
    assert {name: vars(layer)[name] for name in kept if name != "training"} == {
        name: value for name, value in kept.items() if name != "training"
    }
    assert asked == [True]
