"""torch.func and torch.autograd.functional over a layer: as over torch's layers, with the same results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interop.interop_models import formula
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import keelnorm as kn

SHAPE = (4, 3, 2, 2)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use


def randomized(layer):
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if "num" not in name:
                value.uniform_(0.5, 2)
    return layer


def evaluated(norm=kn.BatchNorm2d):
    return randomized(norm(3)).eval()


def pair(training):
    """Layers whose result has no side effect: evaluated, or in training without running statistics."""
    ours = randomized(kn.BatchNorm2d(3, track_running_stats=not training))
    theirs = nn.BatchNorm2d(3, track_running_stats=not training).double()
    theirs.load_state_dict(ours.state_dict())
    return ours.train(training), theirs.train(training)


def assert_near(found, expected, units=128):
    bound = units * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max().item() <= bound


def _gradient(f: Any) -> Any:
    return grad(lambda x: f(x).pow(3).sum())


#: Each transform as (function of one tensor, x) -> tensor.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: grad(lambda x: f(x).pow(3).sum())(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: f(x).pow(3).sum())(x).pow(2).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](x.cos())[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jvp of grad": lambda f, x: jvp(_gradient(f), (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).pow(3).sum())(x),
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "functional.jacobian vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).pow(3).sum(), x),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).pow(3).sum(), x, x.cos())[1],
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos())[1],
    "functional.vjp": lambda f, x: torch.autograd.functional.vjp(f, x, x.cos())[1],
}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform, training, activation):
    ours, theirs = pair(training)
    x = torch.randn(SHAPE)

    def expected_of(x):
        y = theirs(x) + x
        return y.relu() if activation else y

    found = transform(lambda x: ours(x, x, activation=activation), x)
    assert_near(found, transform(expected_of, x.double()), units=512)


HIGHER = {
    "grad of jvp": lambda f, x: grad(lambda x: jvp(lambda x: f(x).pow(3).sum(), (x,), (x.cos(),))[1])(x),
    "jvp of jvp": lambda f, x: jvp(lambda x: jvp(f, (x,), (x.cos(),))[1], (x,), (x.cos(),))[1],
    "jacrev of jacfwd": lambda f, x: jacrev(jacfwd(lambda x: f(x).pow(3).sum()))(x),
    "grad of grad of grad": lambda f, x: grad(lambda x: TRANSFORMS["grad of grad"](f, x).pow(2).sum())(x),
}


@pytest.mark.parametrize(
    "training",
    [
        True,
        False,
    ],
    ids=["training", "evaluation"],
)
@pytest.mark.parametrize("transform", HIGHER.values(), ids=HIGHER)
def test_higher_orders_agree_with_the_formula(transform, training):
    """Derivatives of forward-mode derivatives, and of the second: torch's batch norm is no oracle for these."""
    ours, oracle = pair(training)
    ours, x = ours.double(), torch.randn(SHAPE, dtype=torch.float64)
    expected = transform(lambda x: formula(oracle, x), x)
    found = transform(ours, x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_gradients_of_parameters():
    ours, theirs = pair(True)
    x = torch.randn(SHAPE)
    found, expected = (
        grad(lambda p, norm=norm, x=x: functional_call(norm, p, (x,)).pow(3).sum())(dict(norm.named_parameters()))
        for norm, x in ((ours, x), (theirs, x.double()))
    )
    assert found.keys() == expected.keys() == {"weight", "bias"}
    for name, value in found.items():
        assert_near(value, expected[name])


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_vmap_over_an_evaluated_layer(in_dim, chunk_size):
    layer = evaluated()
    stack = torch.randn(3, *SHAPE)
    expected = torch.stack([layer(x, activation="relu") for x in stack])
    batched = vmap(lambda x: layer(x, activation="relu"), in_dims=in_dim, chunk_size=chunk_size)
    assert_near(batched(stack.movedim(0, in_dim)), expected.double())
    assert layer.num_batches_tracked.item() == 0


def test_vmap_over_a_training_layer_without_moments():
    """Each slice is normalized with its own batch."""
    layer = kn.BatchNorm2d(3, track_running_stats=False)
    stack = torch.randn(3, *SHAPE)
    assert_near(vmap(layer)(stack), torch.stack([layer(x) for x in stack]).double())


def test_vmap_over_stacked_layers():
    """An ensemble in one call: parameters and buffers stacked by torch.func."""
    layers = [evaluated() for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(SHAPE)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    assert_near(found, torch.stack([layer(x) for layer in layers]).double())


def test_per_sample_gradients():
    ours, theirs = pair(False)
    xs = torch.randn(5, 3, 2, 2)

    def per_sample(norm, xs):
        def loss(parameters, x):
            return functional_call(norm, parameters, (x.unsqueeze(0),)).pow(2).sum()

        return vmap(grad(loss), in_dims=(None, 0))(dict(norm.named_parameters()), xs)

    found, expected = per_sample(ours, xs), per_sample(theirs, xs.double())
    for name in ("weight", "bias"):
        assert found[name].shape == (5, 3)
        assert_near(found[name], expected[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_batched_gradients(training):
    """is_grads_batched runs the backward under vmap."""
    ours, theirs = pair(training)
    x, directions = torch.randn(SHAPE), torch.randn(3, *SHAPE)
    results = []
    for norm, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        tensors = [leaf, *norm.parameters()]
        results.append(torch.autograd.grad(norm(leaf), tensors, directions.to(dtype), is_grads_batched=True))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)


def test_training_under_vmap_is_refused_as_by_torch():
    """One set of running statistics can't be updated by several batches at once."""
    for layer in (kn.BatchNorm2d(3), nn.BatchNorm2d(3)):
        with pytest.raises(RuntimeError, match="running_mean or running_var"):
            vmap(layer)(torch.randn(2, *SHAPE))
        assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_refused_training_under_vmap_counts_nothing(momentum):
    layer = kn.BatchNorm2d(3, momentum=momentum)
    with pytest.raises(RuntimeError):
        vmap(layer)(torch.randn(2, *SHAPE))
    assert layer.num_batches_tracked.item() == 0


def test_training_with_moments_under_grad_is_refused_as_by_torch():
    """torch.func allows no change of a tensor from outside; functional_call hands the buffers in."""
    for layer in (kn.BatchNorm2d(3), nn.BatchNorm2d(3)):
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            grad(lambda x, layer=layer: layer(x).sum())(torch.randn(SHAPE))
        assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_with_moments_handed_in(momentum):
    """As the tutorial on ensembles has it: the updated buffers come back as auxiliary values."""
    ours = kn.BatchNorm2d(3, momentum=momentum)
    x = torch.randn(SHAPE)

    def loss(parameters, buffers):
        buffers = {name: value.clone() for name, value in buffers.items()}
        y = functional_call(ours, (parameters, buffers), (x,))
        return y.pow(3).sum(), buffers

    gradients, buffers = grad(loss, has_aux=True)(dict(ours.named_parameters()), dict(ours.named_buffers()))
    assert ours.num_batches_tracked.item() == 0
    ours(x).pow(3).sum().backward()
    for name, value in ours.named_buffers():
        assert_near(buffers[name], value.double())
    for name, parameter in ours.named_parameters():
        assert_near(gradients[name], parameter.grad.double())


def test_functionalize():
    layer, twin = kn.BatchNorm2d(3), kn.BatchNorm2d(3)
    x = torch.randn(SHAPE)
    assert_near(torch.func.functionalize(layer)(x), twin(x).double())
    for found, expected in zip(layer.buffers(), twin.buffers(), strict=True):
        assert_near(found, expected.double())
