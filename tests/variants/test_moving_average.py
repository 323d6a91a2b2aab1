"""Moving average batch normalization against a loop that keeps every statistic, and its backward written out."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keelnorm.nn.moving_average import MovingAverageBatchNorm, center_weights

EPS = 1e-5
SHAPE = (3, 4, 5, 2)


def over(x):
    return [0, *range(2, x.dim())]


def spread(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


class Loop:
    """Section 4 of the paper, float64, all history kept."""

    def __init__(self, norm):
        self.norm = copy.deepcopy(norm)
        self.squares, self.products = [], []
        self.running = torch.ones(norm.num_features, dtype=torch.float64)

    def average(self, values):
        if len(self.squares) <= self.norm.burn_in:
            return values[-1]
        return torch.stack(values[-self.norm.window :]).mean(0)

    def step(self, x, dy, weight, bias):
        """y, dx, dweight, dbias."""
        norm = self.norm
        square = x.square().mean(over(x))
        self.squares.append(square)
        chi = (self.average(self.squares) + EPS).sqrt()
        r = torch.ones_like(chi)
        if len(self.squares) > norm.burn_in:
            r = (chi / (self.running + EPS).sqrt()).clamp(1 / norm.r_max, norm.r_max)
        self.running = (1 - norm.momentum) * self.running + norm.momentum * square
        z = x / spread(chi, x)
        y = spread(r * weight, x) * z + spread(bias, x)
        g = dy * spread(r * weight, x)
        self.products.append((g * z).mean(over(x)))
        dx = (g - z * spread(self.average(self.products), x)) / spread(chi, x)
        return y, dx, (dy * spread(r, x) * z).sum(over(x)), dy.sum(over(x))


def make(**keywords):
    norm = MovingAverageBatchNorm(SHAPE[1], **{"dtype": torch.float64, "window": 3, "burn_in": 2, **keywords})
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


def run(norm, x, dy):
    """y and the gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)


def data(scale=1.0, shape=SHAPE, dtype=torch.float64):
    return scale * (torch.randn(shape, dtype=dtype) + 0.5), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5), SHAPE])
@pytest.mark.parametrize("options", [{}, {"burn_in": 0, "window": 4}, {"r_max": 1.0}, {"momentum": 0.5, "r_max": 3}])
def test_forward_and_backward(shape, options):
    norm = make(**options)
    loop, clipped = Loop(norm), set()
    for number in range(9):
        x, dy = data(0.9 + 0.1 * number, shape)
        wanted = loop.step(x, dy, norm.weight.detach(), norm.bias.detach())
        for a, b in zip(run(norm, x, dy), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, loop.running, rtol=1e-12, atol=1e-12)
        assert not norm.running_mean.any()
        r = norm._recall[-1][1][1]
        clipped |= {bool(((r > 1 / norm.r_max) & (r < norm.r_max)).all())}
    assert norm.num_batches_tracked == 9
    if norm.r_max == 1.05:
        assert False in clipped
    if norm.r_max == 3:
        assert clipped == {True}


def by_root_mean_square(x, norm):
    chi = (x.square().mean(over(x), keepdim=True) + EPS).sqrt()
    return x / chi * spread(norm.weight, x) + spread(norm.bias, x)


@pytest.mark.parametrize("options", [{"burn_in": 100}, {"track_running_stats": False}, {"window": 1, "r_max": 1.0}])
def test_alone_it_is_the_root_mean_square_and_its_derivative(options):
    norm = make(**options)
    for _ in range(4):
        x, dy = data()
        x.requires_grad_()
        wanted = by_root_mean_square(x, norm)
        inputs = (x, norm.weight, norm.bias)
        for a, b in zip(run(norm, x, dy), (wanted, *torch.autograd.grad(wanted, inputs, dy)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    x = torch.randn(3, SHAPE[1], dtype=torch.float64, requires_grad=True)
    norm.requires_grad_(False)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_evaluation_is_by_the_running_mean_square():
    norm = make()
    for _ in range(5):
        run(norm, *data())
    norm.eval()
    x, _ = data()
    wanted = x / spread((norm.running_var + EPS).sqrt(), x) * spread(norm.weight, x) + spread(norm.bias, x)
    torch.testing.assert_close(norm(x), wanted)


def test_a_loaded_mean_decays():
    norm, plain = make(momentum=0.5), nn.BatchNorm2d(SHAPE[1], dtype=torch.float64)
    plain.running_mean.fill_(8)
    run(norm, *data())
    norm.load_state_dict(plain.state_dict())
    assert not norm._squares
    assert not norm._products
    for _ in range(3):
        run(norm, *data())
    torch.testing.assert_close(norm.running_mean, torch.ones(SHAPE[1], dtype=torch.float64))
    assert list(norm.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(norm.state_dict())


def test_the_mask_is_as_if_the_rest_were_not_there():
    norm = make(burn_in=1)
    twin = copy.deepcopy(norm)
    mask = torch.tensor([True, False, True, True])
    for _ in range(5):
        x, dy = data(shape=(4, SHAPE[1], 3))
        x[1] = torch.nan
        wanted = run(twin, x[mask], dy[mask])
        leaf = x.clone().requires_grad_()
        y = norm(leaf, mask=mask)
        found = torch.autograd.grad(y, (leaf, norm.weight, norm.bias), dy)
        assert not y[1].any()
        assert not found[0][1].any()
        for a, b in zip((y[mask], found[0][mask], *found[1:]), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2], ids=["one forward", "two forwards before the backward"])
def test_a_checkpoint_gives_the_same_and_adds_once(forwards, reentrant):
    norm = make()
    twin = copy.deepcopy(norm)
    for _ in range(6):
        xs, dys = zip(*(data() for _ in range(forwards)), strict=True)
        results = []
        for each, call in ((norm, lambda x: checkpoint(norm, x, use_reentrant=reentrant)), (twin, twin)):
            leaves = [x.clone().requires_grad_() for x in xs]
            ys = [call(leaf) for leaf in leaves]
            for y, dy in zip(ys, dys, strict=True):
                y.backward(dy)
            results.append([*ys, *[leaf.grad for leaf in leaves], each.weight.grad, each.bias.grad])
            each.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for name in ("_squares", "_products"):
            kept, wanted = getattr(norm, name), getattr(twin, name)
            torch.testing.assert_close(list(kept), list(wanted), rtol=1e-12, atol=1e-12)
    assert len(norm._products) == 2
    torch.testing.assert_close(norm.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_a_copy_goes_on_by_itself(way):
    norm = make()
    for _ in range(4):
        run(norm, *data())
    other = way(norm)
    for _ in range(3):
        x, dy = data()
        for a, b in zip(run(norm, x, dy), run(other, x, dy), strict=True):
            assert torch.equal(a, b)


def test_a_channel_that_was_not_finite_is_left_out():
    norm = make(burn_in=0)
    twin = copy.deepcopy(norm)
    x, dy = data()
    bad = x.clone()
    bad[0, 2] = torch.inf
    run(norm, bad, dy)
    run(twin, x, dy)
    good = [0, 1, 3]
    assert norm.running_var[2] == 1
    torch.testing.assert_close(norm.running_var[good], twin.running_var[good])
    x, dy = data()
    found, wanted = run(norm, x, dy), run(twin, x, dy)
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a[:, good] if a.dim() > 1 else a[good], b[:, good] if b.dim() > 1 else b[good])
    alone = x[:, 2] / (x[:, 2].square().mean() + EPS).sqrt()
    shape = (found[0][:, 2] - norm.bias[2]) / norm.weight[2] / alone
    torch.testing.assert_close(shape, shape.mean().expand_as(shape))


def test_a_batch_without_values_changes_nothing():
    norm = make(burn_in=0)
    for _ in range(3):
        run(norm, *data())
    kept, state = [t.clone() for t in norm._squares], copy.deepcopy(norm.state_dict())
    run(norm, torch.zeros(0, *SHAPE[1:], dtype=torch.float64), torch.zeros(0, *SHAPE[1:], dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(kept, norm._squares, strict=True))
    torch.testing.assert_close(norm.state_dict(), state, rtol=0, atol=0)
    x = torch.full(SHAPE, torch.nan, dtype=torch.float64, requires_grad=True)
    y = norm(x, mask=torch.zeros(SHAPE[0], dtype=torch.bool))
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    torch.testing.assert_close(norm.state_dict(), state, rtol=0, atol=0)
    x, _ = data()
    before = norm(x)
    assert before.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_stay_near_the_exact(dtype):
    norm, wide = make(dtype=torch.float32, burn_in=1), make(burn_in=1)
    wide.load_state_dict(norm.state_dict())
    for _ in range(4):
        x, dy = data(dtype=dtype)
        found, wanted = run(norm, x, dy), run(wide, x.double(), dy.double())
        assert found[0].dtype == found[1].dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_residual_activation_and_layout():
    norm = make()
    twin = copy.deepcopy(norm)
    x, residual = data(), data()
    x = x[0].to(memory_format=torch.channels_last)
    residual = residual[0].to(memory_format=torch.channels_last)
    y = norm(x, residual, activation="relu")
    torch.testing.assert_close(y, torch.relu(twin(x) + residual))
    assert y.is_contiguous(memory_format=torch.channels_last)


# torch.compile looks at .grad of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compile_leaves_it_to_eager_mode():
    norm = make(dtype=torch.float32, burn_in=0)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(norm, backend="eager")
    for _ in range(4):
        x, dy = data(dtype=torch.float32)
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        y.backward(dy)
        wanted = run(twin, x, dy)
        torch.testing.assert_close(y, wanted[0])
        torch.testing.assert_close(leaf.grad, wanted[1])
    torch.testing.assert_close(list(norm._products), list(twin._products))


def test_errors():
    for value in (0.9, float("nan")):
        with pytest.raises(ValueError, match=f"r_max is a bound of at least 1; got {value}"):
            MovingAverageBatchNorm(3, r_max=value)
    norm = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="x has 3 channels"):
        norm(torch.randn(4, 3))
    assert norm.num_batches_tracked == 0
    assert not norm._squares


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)], ids=str)
def test_centred_weights_give_a_mean_of_zero(layer):
    """For an input whose channels have the same mean, whatever that is."""
    layer = copy.deepcopy(layer)
    weight = layer.weight.detach().clone()
    assert center_weights(layer) is layer
    wanted = weight - weight.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
    torch.testing.assert_close(layer.weight, wanted)
    x = torch.ones(2, 4, *[5] * (weight.dim() - 2)) * 7
    out = layer(x) - spread(layer.bias, layer(x))
    assert out.abs().max() < 1e-5
    layer(torch.randn_like(x)).square().sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient.flatten(1).sum(1).abs().max() < 1e-4 * gradient.abs().max()
    assert "parametrizations.weight.original" in layer.state_dict()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight, wanted)


def test_centring_refuses():
    with pytest.raises(TypeError, match=r"one layer of Linear, Conv1d, Conv2d, Conv3d; got ConvTranspose2d"):
        center_weights(nn.ConvTranspose2d(3, 3, 3))
    conv = center_weights(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="centered already"):
        center_weights(conv)
