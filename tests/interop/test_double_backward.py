"""Second derivatives: float32 layers against torch's in float64, and gradgradcheck of everything in float64."""

import functools

import pytest
import torch
from interop.interop_models import formula
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import keelnorm as kn
from keelnorm.engine.activations import NAMED

C = 3
SHAPE = (4, C, 2, 3)
activations = pytest.mark.parametrize("activation", [None, "relu"])
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
forward_mode = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own use


def layers(training):
    """A float32 layer and its oracle with the same state."""
    layer, oracle = kn.BatchNorm2d(C, eps=1e-2), nn.BatchNorm2d(C, eps=1e-2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.7, 0.4]))
        layer.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
        layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(0.5, 2)
    oracle.load_state_dict(layer.state_dict())
    return layer.train(training), oracle.train(training)


def penalty(norm, activation, x, residual, dy):
    """The gradients of y² + y, and those of a gradient penalty: |dx|² + |dweight|² + |dbias|² + |dresidual|²."""
    tensors = [x, *norm.parameters(), *([] if residual is None else [residual])]
    if isinstance(norm, kn.BatchNorm2d):
        y = norm(x, residual, activation=activation)
    else:
        y = norm(x) if residual is None else norm(x) + residual
        y = y.relu() if activation else y
    first = torch.autograd.grad(y.square() + y, tensors, dy, create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), [dy, *tensors], allow_unused=True)


@activations
@residuals
@trainings
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_gradient_penalty_in_float32(training, with_residual, activation, kernels):
    """The second derivative passes through y, dy and all parameters, and is gated where y is 0."""
    layer, oracle = layers(training)
    inputs = [torch.randn(SHAPE), torch.randn(SHAPE) if with_residual else None, torch.randn(SHAPE)]
    ours = [None if t is None else t.requires_grad_() for t in inputs]
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    with kn.kernels.use(kernels):
        found, expected = penalty(layer, activation, *ours), penalty(oracle, activation, *theirs)
    for found_part, expected_part in zip(found, expected, strict=True):
        for value, value64 in zip(found_part, expected_part, strict=True):
            assert (value is None) == (value64 is None)
            if value is not None:
                # Sums over 24 values of products of four factors each.
                bound = 256 * torch.finfo(torch.float32).eps * max(1.0, value64.abs().max().item())
                assert (value.double() - value64).abs().max().item() <= bound


@trainings
def test_third_derivative(training):
    """Against the formula: the third derivative of torch's own batch norm is wrong in training."""
    layer, oracle = layers(training)
    results = []
    for function, dtype in ((layer, torch.float32), (functools.partial(formula, oracle), torch.float64)):
        x = torch.linspace(-1, 2, 72).view(SHAPE).to(dtype).sin().requires_grad_()
        value = function(x).pow(3).sum()
        for _ in range(3):
            [gradient] = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        results.append(gradient.detach().double())
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[1].abs().max()


def function_and_inputs(training, activation, with_residual, affine):
    mean, var = torch.zeros(C).double(), torch.ones(C).double()

    def function(x, *rest):
        residual = rest[-1] if with_residual else None
        weight, bias = rest[:2] if affine else (None, None)
        return kn.functional.batch_norm(
            x,
            mean.clone(),
            var.clone(),
            weight,
            bias,
            training=training,
            eps=1e-2,
            activation=activation,
            residual=residual,
        )

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = [leaf(2, C, 2), *([leaf(C), leaf(C)] if affine else []), *([leaf(2, C, 2)] if with_residual else [])]
    return function, inputs


@forward_mode
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@activations
@residuals
@trainings
def test_gradcheck(training, with_residual, activation, affine):
    function, inputs = function_and_inputs(training, activation, with_residual, affine)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@forward_mode
@pytest.mark.parametrize("activation", [name for name in NAMED if name not in (None, "relu")])
@residuals
def test_every_activation(activation, with_residual):
    """First and second derivatives, in each mode; the batch's moments depend on x."""
    function, inputs = function_and_inputs(True, activation, with_residual, affine=True)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@forward_mode
@activations
@residuals
@trainings
def test_gradgradcheck(training, with_residual, activation):
    function, inputs = function_and_inputs(training, activation, with_residual, affine=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)
