"""Every activation that fuses: by name and by module, against torch's functions in float64."""

import pytest
import torch
import torch.nn.functional as F
from nn.layer_pairs import CHANNELS, assert_near, randomize, step, twin
from support.activations import FUNCTIONS, kinks_of
from torch import nn

import keelnorm as kn

SHAPE = (4, CHANNELS, 3, 5)

#: Modules, with parameters of their own where they have some.
MODULES = (
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(-0.3),
    nn.LeakyReLU(1), nn.ELU(), nn.ELU(0.4), nn.SiLU(), nn.SiLU(inplace=True), nn.GELU(), nn.GELU("tanh"),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Softplus(), nn.Softplus(2.5, 3.0),
    nn.Identity(),
)  # fmt: skip
#: (what is asked for, its function)
ACTIVATIONS = {**{name: (name, f) for name, f in FUNCTIONS.items()}, **{repr(m): (m, m) for m in MODULES}}

asked = pytest.mark.parametrize(("activation", "function"), ACTIVATIONS.values(), ids=ACTIVATIONS)
names = pytest.mark.parametrize("name", FUNCTIONS)
residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def compare(layer, oracle, activation, function, with_residual, dtype=torch.float32):
    """A step through both: y and every gradient. dy is 0 where rounding may decide on the side of a kink."""
    x, dy = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    residual = torch.randn(SHAPE).to(dtype) if with_residual else None
    inputs = [x.requires_grad_(), *([residual.requires_grad_()] if with_residual else [])]
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    v = oracle(inputs64[0])
    v = v + inputs64[1] if with_residual else v
    y64 = function(v.clone())  # an activation in place would change v
    for kink in kinks_of(activation):
        dy = torch.where((v.detach() - kink).abs() <= 64 * torch.finfo(dtype).eps * (1 + abs(kink)), 0, dy)
    kept = [t.detach().clone() for t in inputs]
    y = layer(*inputs, activation=activation)
    assert y.dtype == dtype
    assert_near(y, y64)
    y64.backward(dy.double()), y.backward(dy)
    for found, expected in zip(inputs, inputs64, strict=True):
        assert_near(found.grad, expected.grad, units=32)
    for (_, found), (_, expected) in zip(layer.named_parameters(), oracle.named_parameters(), strict=True):
        if found.requires_grad:
            assert_near(found.grad, expected.grad, units=32)
    for before, t in zip(kept, inputs, strict=True):
        assert torch.equal(before, t)


@asked
@residuals
@trainings
def test_agrees_with_torch_in_float64(activation, function, with_residual, training, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    compare(layer, oracle, activation, function, with_residual)
    for (name, found), (_, expected) in zip(layer.named_buffers(), oracle.named_buffers(), strict=True):
        assert_near(found, expected) if found.is_floating_point() else None
        assert found.is_floating_point() or torch.equal(found, expected), name


@names
@residuals
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(name, with_residual, dtype, backend):
    """The activation is computed in the dtype of the sums, and rounded once."""
    for training in (True, False):
        layer = randomize(kn.BatchNorm2d(CHANNELS)).to(dtype).train(training)
        oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
        compare(layer, oracle, name, FUNCTIONS[name], with_residual, dtype)


@names
@residuals
def test_without_weight_and_bias(name, with_residual, backend):
    layer = kn.BatchNorm2d(CHANNELS, affine=False)
    compare(layer, nn.BatchNorm2d(CHANNELS, affine=False).double(), name, FUNCTIONS[name], with_residual)


@names
@residuals
def test_channels_last(name, with_residual, backend):
    """The same values and gradients as in the other layout, up to the order of sums, in x's layout."""
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    x, residual, dy = (torch.randn(SHAPE) for _ in range(3))
    arguments = (residual,) if with_residual else ()
    wanted = step(layer, x, dy, *arguments, activation=name)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    found = step(layer, x, dy, *arguments, activation=name)
    assert found["y"].is_contiguous(memory_format=torch.channels_last)
    for key, value in found.items():
        assert_near(value, wanted[key], units=32)


# ---- kinks and infinities

POINTS = (-torch.inf, -1e20, -100.0, -6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 20.0, 21.0, 100.0, 1e20, torch.inf)


def by_layer(values, activation, residual):
    """y and dx where the value in front of the activation is exactly what is given, and dx its derivative."""
    x = torch.tensor(values).view(-1, 1)
    given = torch.tensor(0.0).expand_as(x).clone() if residual else None
    if residual:
        x, given = given, x
    leaves = [t.requires_grad_() for t in (x, given) if t is not None]
    y = kn.functional.batch_norm(
        leaves[0], torch.zeros(1), torch.ones(1), eps=0.0, activation=activation,
        residual=leaves[1] if residual else None,
    )  # fmt: skip
    y.backward(torch.ones_like(y))
    return y.detach().flatten(), leaves[0].grad.flatten(), leaves[-1].grad.flatten()


@names
@residuals
def test_kinks_and_limits_are_torchs(name, with_residual, backend):
    """Where torch's own is NaN at an end of the line, the limit will do."""
    v = torch.tensor(POINTS, requires_grad=True)
    y = FUNCTIONS[name](v)
    [slope] = torch.autograd.grad(y, v, torch.ones_like(v))
    found_y, *gradients = by_layer(POINTS, name, with_residual)
    known = ~y.isnan()
    right = FUNCTIONS[name](v.detach().double()).float()
    off = 1e-6 if name == "gelu" and backend == "reference" else 1e-7  # torch's own gelu is 7e-7 off at -3
    torch.testing.assert_close(found_y[known], right[known], rtol=1e-6, atol=off)
    for found in gradients:
        ends = slope.isnan()
        assert bool((v.detach()[ends].abs() >= 1e20).all())
        torch.testing.assert_close(found[~ends], slope[~ends], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.2, 1.0, 3.0])
def test_slopes_of_any_sign(slope, backend):
    module = nn.LeakyReLU(slope)
    y, dx, _ = by_layer((-2.0, -0.0, 0.0, 2.0), module, False)
    assert y.tolist() == pytest.approx([-2 * slope, 0, 0, 2])
    assert dx.tolist() == pytest.approx([slope, slope, slope, 1])


@names
def test_nan_comes_through(name, backend):
    for residual in (False, True):
        y, *_ = by_layer((torch.nan, 1.0), name, residual)
        assert y[0].isnan()
        assert y[1].isfinite()


# ---- what is asked for


def test_parameters_are_taken_at_the_call():
    """A module whose parameter changes counts with the new one."""
    layer, x, module = kn.BatchNorm1d(CHANNELS), torch.randn(7, CHANNELS), nn.LeakyReLU(0.1)
    first = layer(x, activation=module)
    module.negative_slope = 0.5
    assert not torch.equal(layer(x, activation=module), first)
    assert torch.equal(layer(x, activation=module), layer(x, activation=nn.LeakyReLU(0.5)))


class OurReLU(nn.ReLU):
    pass


def hooked():
    module = nn.SiLU()
    module.register_forward_hook(lambda *args: None)
    return module


def patched():
    module = nn.SiLU()
    vars(module)["forward"] = torch.sigmoid
    return module


def learned():
    module = nn.LeakyReLU()
    vars(module)["negative_slope"] = torch.tensor(0.1, requires_grad=True)
    return module


def of_another_kind():
    module = nn.GELU()
    module.approximate = "sigmoid"
    return module


REFUSED = {
    "a subclass": (OurReLU(), "no subclass"),
    "a hook": (hooked(), "has a hook"),
    "a forward of its own": (patched(), "a forward"),
    "a learned slope": (learned(), "a parameter of its own"),
    "an unknown approximation": (of_another_kind(), "a parameter of its own"),
    "a module with weights": (nn.PReLU(), "PReLU(num_parameters=1)"),
    "a sequence": (nn.Sequential(nn.ReLU()), "Sequential"),
    "a class": (nn.SiLU, "(type)"),
    "a function": (F.silu, "function"),
    "none": ("none", "'none' (str)"),
    "swish": ("swish", "'swish' (str)"),
    "a parameter in the name": ("leaky_relu_0.01", "'leaky_relu_0.01' (str)"),
}


@pytest.mark.parametrize(("activation", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(activation, words, backend):
    layer, x = kn.BatchNorm2d(CHANNELS), torch.randn(SHAPE)
    for call in (
        lambda: layer(x, activation=activation),
        lambda: kn.functional.batch_norm(x, layer.running_mean, layer.running_var, activation=activation),
    ):
        with pytest.raises(ValueError, match="activation must be one of None, 'relu', 'relu6', 'leaky_relu'") as caught:
            call()
        assert "LeakyReLU" in str(caught.value)
        assert words in str(caught.value)
    assert layer.num_batches_tracked.item() == 0
