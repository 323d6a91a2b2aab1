"""Which forwards the window of cross-iteration batch normalization takes in, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from variants.cross_iteration_parts import (
    EPS,
    WINDOW,
    batch,
    make,
    plain_output,
    train,
)

from keelnorm.nn.cross_iteration import CrossIterationBatchNorm


@pytest.mark.parametrize("forwards", [1, 2], ids=["one forward", "two forwards before the backward"])
def test_a_checkpoint_gives_the_same_and_adds_once(forwards):
    net = make()
    twin = copy.deepcopy(net)
    for _ in range(4):
        parts = [batch().requires_grad_() for _ in range(forwards)]
        results = []
        for each, run in ((net, lambda d: checkpoint(net, d, use_reentrant=False)), (twin, twin)):
            ys = [run(data) for data in parts]
            dy = torch.linspace(-1, 1, ys[0].numel(), dtype=torch.float64).view_as(ys[0])
            gradients = torch.autograd.grad(ys, [*each.parameters(), *parts], [dy] * forwards)
            results.append([*ys, *gradients])
            with torch.no_grad():
                for parameter, gradient in zip(each.parameters(), gradients, strict=False):
                    parameter -= 0.02 * gradient
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert len(net[1]._last) == len(twin[1]._last)
        for name, value in net.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name])
    assert len(net[1]._last) == WINDOW - 1


def test_a_forward_without_gradients_uses_the_window_and_adds_nothing():
    net = make()
    for _ in range(3):
        train(net, batch())
    data = batch()
    before = [own.mean.clone() for own, _ in net[1]._last]
    with torch.no_grad():
        quiet = net(data)
    assert [bool(torch.equal(own.mean, b)) for (own, _), b in zip(net[1]._last, before, strict=True)] == [True, True]
    torch.testing.assert_close(quiet, net(data), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(quiet, net(data), rtol=1e-3)


def test_evaluation_and_a_layer_without_running_statistics():
    net = make()
    for _ in range(3):
        train(net, batch())
    net.eval()
    data, norm = batch(), net[1]
    wanted = nn.functional.batch_norm(
        net[0](data), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, EPS
    )
    torch.testing.assert_close(net(data), wanted)
    net = make(track_running_stats=False)
    for _ in range(3):
        data = batch()
        torch.testing.assert_close(net(data), plain_output(net, data))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_goes_on_by_itself(way):
    net = make()
    for _ in range(3):
        train(net, batch())
    other = way(net)
    assert other[1]._producer[0] is other[0]
    for _ in range(3):
        data = batch()
        assert torch.equal(train(other, data), train(net, data))
    train(other, batch())
    assert not torch.equal(other[0].weight, net[0].weight)


def test_a_checkpoint_runs_the_segment_as_often_as_documented():
    net, runs = make(), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    checkpoint(net, batch(), use_reentrant=False)
    assert len(runs) == 3
    with torch.no_grad():
        checkpoint(net, batch(), use_reentrant=False)
    assert len(runs) == 4


def test_under_a_reentrant_checkpoint_the_window_stays_empty():
    net = make()
    for _ in range(3):
        data = batch().requires_grad_()
        y = checkpoint(net, data, use_reentrant=True)
        torch.testing.assert_close(y, plain_output(net, data))
        y.sum().backward()
    assert not net[1]._last


def test_a_producer_that_does_not_train_is_constant():
    net = make()
    net[0].requires_grad_(False)
    loose = CrossIterationBatchNorm(6, window=WINDOW, compensate=False, dtype=torch.float64)
    loose.load_state_dict(net[1].state_dict())
    for _ in range(4):
        data = batch()
        assert torch.equal(net(data), loose(net[0](data)))


def test_paused_it_uses_the_window_and_adds_nothing():
    net = make()
    for _ in range(3):
        train(net, batch())
    twin, data = copy.deepcopy(net), batch()
    net[1].track_running_stats = False
    net(batch())
    assert torch.equal(net(data), twin(data))


def test_another_device_empties_the_window():
    net = make()
    for _ in range(2):
        train(net, batch())
    net[1].double()
    assert len(net[1]._last) == 2
    net[1].to("meta")
    assert not net[1]._last


def test_attaching_changes_neither_state_nor_parameters():
    net = make(dtype=torch.float32)
    assert list(net[1].state_dict()) == list(nn.BatchNorm2d(6).state_dict())
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert len(list(net.modules())) == 3
    nn.BatchNorm2d(6).load_state_dict(net[1].state_dict())
    net[1].load_state_dict(nn.BatchNorm2d(6).state_dict())


def test_it_leaves_the_graph_for_the_backward():
    """A second forward through the same producer, and a gradient of the weight, are untouched by ∂mean/∂θ."""
    net = make()
    net(batch()).sum().backward()
    net[0].weight.grad = None
    data = batch()
    y = net(data)
    assert net[0].weight.grad is None
    y.square().sum().backward()
    assert net[0].weight.grad is not None


# torch.compile looks at .grad of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compile_leaves_it_to_eager_mode():
    net = make(dtype=torch.float32)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="eager")
    for _ in range(3):
        data = batch(dtype=torch.float32)
        torch.testing.assert_close(compiled(data), twin(data))
        with torch.no_grad():
            net[0].weight += 0.05
            twin[0].weight += 0.05
    assert len(net[1]._last) == WINDOW - 1


def unchanged(norm, call, error, match):
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(error, match=match):
        call()
    assert not norm._last
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


def test_errors():
    net = make(dtype=torch.float32)
    conv, norm = net
    x = torch.randn(2, 6, 4, 4)
    unchanged(norm, lambda: norm(x), ValueError, r"x does not come from the producer's weight \(a float32 tensor")
    other = nn.Conv2d(4, 6, 3)
    strange = other(batch(dtype=torch.float32))
    unchanged(norm, lambda: norm(strange), ValueError, "attach the module whose output")
    alone = CrossIterationBatchNorm(6)
    unchanged(alone, lambda: alone(x), ValueError, r"layer\.attach\(conv\) once.*compensate=False")
    with pytest.raises(ValueError, match=r"6 output channels .* got a float32 tensor of shape \(5, 3\)"):
        norm.attach(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="6 output channels"):
        norm(conv(batch(dtype=torch.float32)), producer_weight=torch.zeros(6))
    with pytest.raises(TypeError, match="transposed"):
        norm.attach(nn.ConvTranspose2d(6, 6, 3))
    with pytest.raises(TypeError, match="attach takes the module in front"):
        norm.attach(nn.ReLU())
    with pytest.raises(ValueError, match=r"window is a number of batches, 1 or more; got 0 \(int\)"):
        CrossIterationBatchNorm(3, window=0)
    with pytest.raises(ValueError, match=r"burn_in is a number of batches, 0 or more; got 1.5 \(float\)"):
        CrossIterationBatchNorm(3, burn_in=1.5)


def test_one_value_per_channel_changes_nothing():
    net = make("linear", dtype=torch.float32)
    unchanged(net[1], lambda: net(torch.randn(1, 4)), ValueError, "one value per channel has no variance")


def test_a_parametrized_weight_within_cached():
    net = make(dtype=torch.float32)
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match=r"parametrize\.cached"):
        net(batch(dtype=torch.float32))
    with nn.utils.parametrize.cached():
        net(batch(dtype=torch.float32))
    assert len(net[1]._last) == 1
