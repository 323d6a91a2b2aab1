"""``kn.Sequential`` fuses every activation there is, with its parameters, and leaves all others as they are."""

import contextlib
import copy

import pytest
import torch
from nn.layer_pairs import assert_near, randomize
from torch import nn

import keelnorm as kn
from keelnorm.engine.fusion import pending as fusion

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def operators_run(net, x=X):
    before = sum(kn.kernels.calls().values())
    net(x)
    return sum(kn.kernels.calls().values()) - before


ACTIVATIONS = (
    nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(0.3, inplace=True), nn.ELU(0.5), nn.SiLU(), nn.GELU(), nn.GELU("tanh"),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Softplus(2.0, 3.0),
)  # fmt: skip


def fused_in(net, x=X):
    """How many kernels compute a layer with what follows it, in one call."""
    before = fusion.completed
    net(x)
    return fusion.completed - before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_every_activation_fuses(module, training, backend):
    """With its parameters; the values are those of the two modules of torch one after the other, in float64."""
    net = kn.Sequential(randomize(kn.BatchNorm2d(3)), module).train(training)
    theirs = nn.Sequential(nn.BatchNorm2d(3).double(), copy.deepcopy(module)).train(training)
    theirs.load_state_dict(net.state_dict())
    alone = operators_run(copy.deepcopy(net[0]))
    kept = X.clone()
    assert fused_in(net) == 0  # the first call learns
    assert operators_run(net) == alone
    assert fused_in(net) == 1
    assert torch.equal(kept, X)
    net.load_state_dict(theirs.state_dict())
    assert_near(net(X), theirs(X.double()))


@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_every_activation_unfused_with_a_hook(module):
    module = copy.deepcopy(module)
    seen = []
    net = kn.Sequential(randomize(kn.BatchNorm2d(3)), module).eval()
    assert fused_in(net) == 0
    fused = net(X)
    handle = module.register_forward_hook(lambda module, args, y: seen.append(y))
    before = fusion.completed
    assert_near(net(X), fused)
    assert fusion.completed == before
    assert len(seen) == 1
    handle.remove()
    net(X)
    assert torch.equal(net(X), fused)
    assert fused_in(net) == 1
    assert len(seen) == 1


def with_learned_slope():
    module = nn.LeakyReLU()
    vars(module)["negative_slope"] = torch.tensor(0.2, requires_grad=True)
    return module


@pytest.mark.parametrize("module", [nn.PReLU(), nn.Softmax2d(), nn.Identity(), nn.CELU(), nn.Softsign(), nn.RReLU()])
def test_other_activations_run_as_they_are(module):
    net = kn.Sequential(randomize(kn.BatchNorm2d(3)), module).eval()
    for _ in range(3):
        assert torch.equal(net(X), module(net[0](X)))
    assert fused_in(net) == 0


def test_a_changed_parameter_counts():
    net = kn.Sequential(kn.BatchNorm2d(3), nn.LeakyReLU(0.1)).eval()
    assert [fused_in(net) for _ in range(2)] == [0, 1]
    before = net(X)
    vars(net[1])["negative_slope"] = 0.7
    for _ in range(3):
        assert torch.equal(net(X), nn.functional.leaky_relu(net[0](X), 0.7))
    assert not torch.equal(net(X), before)
    assert fused_in(net) == 1


def test_a_learned_parameter_is_left_to_the_module():
    net = kn.Sequential(kn.BatchNorm2d(3), with_learned_slope()).eval()
    for _ in range(3):
        with contextlib.suppress(TypeError):  # torch's own does not take it
            net(X)
    before = fusion.completed
    with contextlib.suppress(TypeError):
        net(X)
    assert fusion.completed == before
