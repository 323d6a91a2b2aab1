"""Forward-mode derivatives: dual numbers through a layer, and through its backward."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import keelnorm as kn

SHAPE = (4, 3, 2, 3)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def pair(training, momentum=0.1):
    ours = kn.BatchNorm2d(3, momentum=momentum).train(training)
    theirs = nn.BatchNorm2d(3, momentum=momentum).double().train(training)
    with torch.no_grad():
        ours.weight.uniform_(-2, 2), ours.bias.normal_(), ours.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_near(found, expected):
    bound = 64 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    assert (found.double() - expected).abs().max().item() <= bound


@trainings
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_dual_numbers(training, activation, momentum):
    """Tangents of x, residual, weight and bias arrive in y; the running statistics are updated as without them."""
    ours, theirs = pair(training, momentum)
    values = [torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(3), torch.randn(3)]
    tangents = [torch.randn_like(value) for value in values]
    outputs = []
    with forward_ad.dual_level():
        for norm, dtype in ((ours, torch.float32), (theirs, torch.float64)):
            x, residual, weight, bias = (
                forward_ad.make_dual(v.to(dtype), t.to(dtype)) for v, t in zip(values, tangents, strict=True)
            )
            del norm.weight, norm.bias
            norm.weight, norm.bias = weight, bias
            if norm is ours:
                y = norm(x, residual, activation=activation)
            else:
                y = norm(x) + residual
                y = y.relu() if activation else y
            outputs.append(forward_ad.unpack_dual(y))
    for found, expected in zip(*outputs, strict=True):
        assert_near(found, expected)
    for found, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_near(found, expected)


@trainings
def test_an_ordinary_tensor_within_a_level(training):
    """Nothing is dual: the values and gradients are the usual ones."""
    ours, theirs = pair(training)
    x = torch.randn(SHAPE, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    with forward_ad.dual_level():
        y, y64 = ours(x), theirs(x64)
        assert forward_ad.unpack_dual(y).tangent is None
    y.square().sum().backward(), y64.square().sum().backward()
    assert_near(y, y64)
    assert_near(x.grad, x64.grad)


@trainings
@pytest.mark.parametrize("with_residual", [False, True])
def test_dual_gradient_into_the_backward(training, with_residual):
    """The backward of a forward that was run before: linear in dy, so its tangent is the backward of dy's tangent."""
    ours, _ = pair(training)
    x, residual = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE) if with_residual else None
    y = ours(x, residual, activation="relu")
    dy, tangent = torch.randn(SHAPE), torch.randn(SHAPE)
    [expected] = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        [dx] = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
        found = forward_ad.unpack_dual(dx).tangent
    assert found is not None
    assert_near(found, expected.double())


def test_jvp_of_a_backward():
    """The same with torch.func, as a Hessian-vector product by forward over a plain backward does it."""
    ours, _ = pair(True)
    x = torch.randn(SHAPE, requires_grad=True)
    y = ours(x)
    dy, tangent = torch.randn(SHAPE), torch.randn(SHAPE)

    def backward(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    found = torch.func.jvp(backward, (dy,), (tangent,))[1]
    assert_near(found, backward(tangent).double())
