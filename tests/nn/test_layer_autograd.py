"""Autograd's rules hold for a layer: what is saved, what may change meanwhile, what gets a gradient."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_near, assert_untouched, randomize, snapshot, step, twin
from torch import nn

import keelnorm as kn

SHAPE = (4, CHANNELS, 3, 3)
MODIFIED = r"modified by an inplace operation"
activations = pytest.mark.parametrize("activation", [None, "relu"])
residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def problem(training=True, with_residual=True):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    x = torch.randn(SHAPE, requires_grad=True)
    residual = torch.randn(SHAPE, requires_grad=True) if with_residual else None
    return layer, x, residual, torch.randn(SHAPE)


def gradients(y, dy, layer, x, residual=None, **keywords):
    tensors = [x, *layer.parameters(), *([] if residual is None else [residual])]
    return torch.autograd.grad(y, tensors, dy, **keywords)


def assert_equal_all(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


#: What each tensor's modification leads to: an error, or the gradients of what was computed. Either is right for bias
#: and y, which are needed for the activation only.
OUTCOMES = {
    "x": {"error"},
    "weight": {"error"},
    "bias": {"error", "right"},
    "y": {"error", "right"},
    "residual": {"right"},
    "running_mean": {"right"},
    "running_var": {"right"},
}


MODIFICATIONS = [(name, there) for name in OUTCOMES for there in (False, True) if there or name != "residual"]


@activations
@trainings
@pytest.mark.parametrize(("modified", "with_residual"), MODIFICATIONS)
def test_modification_between_forward_and_backward(modified, training, with_residual, activation, backend):
    layer, x, residual, dy = problem(training, with_residual)
    y = layer(x, residual, activation=activation)
    expected = gradients(y, dy, layer, x, residual, retain_graph=True)
    tensors = {"x": x, "residual": residual, "y": y, **dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        tensors[modified].mul_(-3).add_(1)
    try:
        found, message = gradients(y, dy, layer, x, residual), ""
    except RuntimeError as error:
        found, message = None, str(error)
    if found is None:
        assert MODIFIED in message
        assert "error" in OUTCOMES[modified]
    else:
        assert "right" in OUTCOMES[modified]
        assert_equal_all(found, expected)


def test_bias_may_change_before_the_backward_as_in_torch():
    """Without an activation the gradients do not depend on bias, and torch lets it change."""
    for norm in (nn.BatchNorm2d, kn.BatchNorm2d):
        layer = norm(CHANNELS)
        y = layer(torch.randn(SHAPE))
        with torch.no_grad():
            layer.bias.add_(1)
        y.sum().backward()


def test_an_activation_in_place_follows(backend):
    """The commonest code there is: ReLU(inplace=True) after a batch norm, each a module of its own."""
    layer, x, _, dy = problem(with_residual=False)
    net = nn.Sequential(layer, nn.ReLU(inplace=True))
    oracle = nn.Sequential(twin(layer, nn.BatchNorm2d, CHANNELS), nn.ReLU())
    for name, value in step(net, x, dy).items():
        assert_near(value, step(oracle, x.double(), dy.double())[name], units=32)


@activations
@residuals
def test_two_forwards_then_both_backwards(with_residual, activation, backend):
    """Each backward belongs to its forward, whichever comes first."""
    layer, first, residual, dy = problem(True, with_residual)
    second = torch.randn(SHAPE, requires_grad=True)
    expected = [gradients(layer(x, residual, activation=activation), dy, layer, x, residual) for x in (first, second)]
    ys = [layer(x, residual, activation=activation) for x in (first, second)]
    assert_equal_all(gradients(ys[1], dy, layer, second, residual), expected[1])
    assert_equal_all(gradients(ys[0], dy, layer, first, residual), expected[0])


@activations
def test_training_between_an_evaluation_and_its_backward(activation, backend):
    """The moments that the evaluation used have changed by then; its gradients have not."""
    layer, x, residual, dy = problem(training=False)
    expected = gradients(layer(x, residual, activation=activation), dy, layer, x, residual)
    y = layer(x, residual, activation=activation)
    before = snapshot(layer)
    layer.train()(x)
    assert not torch.equal(layer.running_mean, before["running_mean"])
    assert_equal_all(gradients(y, dy, layer, x, residual), expected)


def test_a_layer_used_twice_in_one_forward(backend):
    layer, x, _, dy = problem(with_residual=False)
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    net, oracle_net = nn.Sequential(layer, nn.Tanh(), layer), nn.Sequential(oracle, nn.Tanh(), oracle)
    found, expected = step(net, x, dy), step(oracle_net, x.double(), dy.double())
    for name in expected:
        assert_near(found[name], expected[name], units=64)
    assert layer.num_batches_tracked.item() == oracle.num_batches_tracked.item() == 4


@activations
@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias", "", "x weight", "residual bias"])
@trainings
def test_gradients_go_where_they_are_required(training, wanted, activation, backend):
    layer, x, residual, dy = problem(training)
    tensors = {"x": x, "residual": residual, "weight": layer.weight, "bias": layer.bias}
    everything = dict(zip(tensors, torch.autograd.grad(
        layer(x, residual, activation=activation), list(tensors.values()), dy), strict=True))  # fmt: skip
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted.split())
    y = layer(x, residual, activation=activation)
    assert y.requires_grad is bool(wanted)
    if wanted:
        y.backward(dy)
    for name, tensor in tensors.items():
        if name in wanted.split():
            assert torch.equal(tensor.grad, everything[name]), name
        else:
            assert tensor.grad is None, name


def test_frozen_layer_passes_gradients_on(backend):
    layer, x, _, dy = problem(with_residual=False)
    expected = step(layer, x, dy)["x"]
    layer.requires_grad_(False)
    layer(x).backward(dy)
    assert torch.equal(x.grad, expected)


@activations
def test_backward_twice(activation, backend):
    """With retain_graph the same again; without it torch's error."""
    layer, x, residual, dy = problem()
    y = layer(x, residual, activation=activation)
    first = gradients(y, dy, layer, x, residual, retain_graph=True)
    assert_equal_all(gradients(y, dy, layer, x, residual), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, dy, layer, x, residual)


@activations
def test_gradients_accumulate_and_leave_dy_alone(activation, backend):
    """Where x is its own residual both contributions arrive, and no gradient shares memory with the one given."""
    layer, x, _, dy = problem(with_residual=False)
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    given, x64 = dy.clone(), x.detach().double().requires_grad_()
    y64 = oracle(x64) + x64
    (y64.relu() if activation else y64).backward(dy.double())
    layer(x, x, activation=activation).backward(dy)
    assert_near(x.grad, x64.grad, units=32)
    once = x.grad.clone()
    layer(x, x, activation=activation).backward(dy)
    assert torch.equal(x.grad, 2 * once)
    residual = torch.zeros(SHAPE, requires_grad=True)
    layer(x, residual).backward(dy)
    residual.grad.zero_()
    assert torch.equal(dy, given)


@pytest.mark.parametrize("layout", ["expanded", "channels_last", "strided"])
def test_gradient_of_another_layout(layout, backend):
    layer, x, residual, dy = problem()
    if layout == "expanded":
        dy = torch.tensor(1.5).expand(SHAPE)
    expected = gradients(layer(x, residual, activation="relu"), dy.clone().contiguous(), layer, x, residual)
    if layout == "channels_last":
        dy = dy.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        dy = torch.stack([dy, dy], dim=-1)[..., 0]
    assert_equal_all(gradients(layer(x, residual, activation="relu"), dy, layer, x, residual), expected)


@trainings
def test_tensors_packed_by_hooks(training, backend):
    """What is saved goes through saved_tensors_hooks, as offloading needs it."""
    layer, x, residual, dy = problem(training)
    expected = gradients(layer(x, residual, activation="relu"), dy, layer, x, residual)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x, residual, activation="relu")
    assert_equal_all(gradients(y, dy, layer, x, residual), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@trainings
def test_grad_modes_and_version_counters(mode, training, backend):
    """The buffers' versions count each update, in every mode, and nothing else."""
    layer, x, *_ = problem(training)
    expected = layer(x).detach()
    versions = [buffer._version for buffer in layer.buffers()]
    with mode():
        y = layer(x)
    assert y.requires_grad is (mode is torch.enable_grad)
    assert y.is_inference() is (mode is torch.inference_mode)
    assert torch.equal(y, expected)
    for before, (name, buffer) in zip(versions, layer.named_buffers(), strict=True):
        assert (buffer._version > before) is training, name
    layer(x).sum().backward()  # the buffers are ordinary tensors still


def test_layer_made_in_inference_mode_fails_without_an_update():
    with torch.inference_mode():
        layer = kn.BatchNorm2d(CHANNELS)
        before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        layer(torch.randn(SHAPE))
    assert_untouched(layer, before)


def test_threads(backend):
    """Layers of their own in threads of their own, at the same time: the same bits as one after the other."""

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        layer = kn.BatchNorm2d(CHANNELS)
        results = []
        for _ in range(5):
            x = torch.randn(8, CHANNELS, 16, 16, generator=generator)
            results.append(step(layer, x, x.cos(), x, activation="relu"))
        return layer, results

    one_by_one = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(train, range(4)))
    for (layer, results), (other, others) in zip(one_by_one, at_once, strict=True):
        assert_untouched(other, layer.state_dict())
        for found, expected in zip(others, results, strict=True):
            assert_equal_all(list(found.values()), list(expected.values()))
