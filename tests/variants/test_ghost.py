"""GhostBatchNorm: groups, what is left over, running statistics, and both ways of computing it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from variants.cases_remedies import by_batch, spread

import keelnorm as kn
from keelnorm.nn._shared import consecutive_groups
from keelnorm.nn.ghost import GhostBatchNorm

ACTIVATIONS = {None: lambda v: v, "relu": F.relu, "silu": F.silu, "leaky_relu": F.leaky_relu}
SHAPES = ((7, 3), (7, 3, 129), (6, 4, 11, 12), (7, 4, 3, 3))


def layer_for(channels, size, dtype=torch.float64, **keywords):
    layer = GhostBatchNorm(channels, size, dtype=dtype, **keywords)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def gradients(y, leaves, dy):
    return torch.autograd.grad(y, leaves, dy.to(y.dtype))


def by_formula(layer, x, residual, activation, sizes):
    xhat = torch.cat([by_batch(part, layer.eps) for part in x.split(sizes)])
    v = xhat if layer.weight is None else xhat * spread(layer.weight, x) + spread(layer.bias, x)
    return ACTIVATIONS[activation](v if residual is None else v + residual)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, kernels, layout, with_residual, activation):
    x, residual, dy = torch.randn(3, *shape, dtype=torch.float64) * 2 + 1
    if layout == "channels last":
        x, residual, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual, dy))
    layer = layer_for(shape[1], 3)
    leaves = [x.requires_grad_(), *layer.parameters()]
    leaves += [residual.requires_grad_()] if with_residual else []
    residual = residual if with_residual else None
    sizes = [3, 3, 1] if shape[0] == 7 and len(shape) > 2 else [3, 4] if shape[0] == 7 else [3, 3]
    with kn.kernels.use(kernels):
        y = layer(x, residual, activation=activation)
    expected = by_formula(layer, x, residual, activation, sizes)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert y.stride() == torch.nn.functional.batch_norm(x, None, None, training=True).stride()
    for found, wanted in zip(gradients(y, leaves, dy), gradients(expected, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_float32_with_a_large_mean(shape, kernels):
    """No digits are lost to a mean of 10⁵ deviations, in a group or between groups."""
    x = (torch.randn(shape) + 1e5).requires_grad_()
    layer = layer_for(shape[1], 2, torch.float32, momentum=1.0)
    with kn.kernels.use(kernels):
        y = layer(x)
    sizes = [2] * (shape[0] // 2) + [1] * (shape[0] % 2)
    if len(shape) == 2:
        sizes[-2:] = [3]
    torch.testing.assert_close(y.double(), by_formula(copy.deepcopy(layer).double(), x.double(), None, None, sizes),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    var = x.detach().double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("size", [6, 100])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 7, 7)], ids=str)
def test_one_group_is_batch_norm(shape, size):
    """To the bit: output, gradients; the running statistics to rounding."""
    x, residual, dy = torch.randn(3, *shape)
    ghost = layer_for(shape[1], size, torch.float32)
    plain = kn.BatchNorm(shape[1])
    plain.load_state_dict(ghost.state_dict())
    outcomes = []
    for layer in (ghost, plain):
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        y = layer(leaves[0], residual, activation="relu")
        outcomes.append([y, *gradients(y, leaves, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ghost.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("samples", "size", "positions", "sizes"),
    [
        (8, 4, 1, [4, 4]),
        (9, 4, 1, [4, 5]),  # one value has no variance
        (10, 4, 1, [4, 4, 2]),
        (11, 4, 1, [4, 4, 3]),
        (9, 4, 2, [4, 4, 1]),  # one sample of two positions has
        (5, 4, 130, [4, 1]),
        (4, 1, 2, [1, 1, 1, 1]),
        (3, 2, 1, [3]),
        (3, 8, 1, [3]),
    ],
)
def test_what_is_left_over(samples, size, positions, sizes):
    x = torch.randn(samples, 2, positions, dtype=torch.float64)
    x = x if positions > 1 else x.squeeze(2)
    expected = torch.cat([by_batch(part, 1e-5) for part in x.split(sizes)])
    torch.testing.assert_close(GhostBatchNorm(2, size, affine=False, dtype=torch.float64)(x), expected)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooled_moments_are_the_whole_batchs(shape, momentum):
    ghost = GhostBatchNorm(shape[1], 3, momentum=momentum, dtype=torch.float64)
    plain = torch.nn.SyncBatchNorm(shape[1], momentum=momentum, dtype=torch.float64)  # any rank, as ours
    plain.load_state_dict(ghost.state_dict())
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
        ghost(x), plain(x)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ghost.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_sequential_moments(shape):
    """As if each group had been a batch: η·(1 − η)^(G − i) for group i of G."""
    layer = GhostBatchNorm(shape[1], 2, momentum=0.3, update="sequential", dtype=torch.float64)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(shape, dtype=torch.float64)
    layer(x)
    parts = list(x.split(2)) if len(shape) > 2 else [x[:2], x[2:4], x[4:]]
    for part in parts:
        dims = [0, *range(2, x.dim())]
        mean = 0.7 * mean + 0.3 * part.mean(dims)
        var = 0.7 * var + 0.3 * part.var(dims)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == len(parts)


def test_no_groups_in_evaluation():
    x = torch.randn(8, 3, 6, 6)
    layer = layer_for(3, 2, torch.float32)
    layer(x)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
    alone = GhostBatchNorm(3, 2, track_running_stats=False).eval()
    torch.testing.assert_close(alone(x), F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("shape", [(5, 2), (4, 2, 130)], ids=str)
def test_second_derivatives(shape):
    layer = layer_for(shape[1], 2)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)

    def function(x, residual, weight, bias):
        return torch.func.functional_call(copy.deepcopy(layer), {"weight": weight, "bias": bias}, (x, residual),
                                          {"activation": "silu"})  # fmt: skip

    given = [t.detach().clone().requires_grad_() for t in (x, residual, layer.weight, layer.bias)]
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)  # 130 positions are many


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_function_transforms_and_forward_mode():
    x, tangent = torch.randn(2, 5, 3, 130, dtype=torch.float64)
    layer = layer_for(3, 2, track_running_stats=False)

    def ours(x):
        return layer(x, activation="silu").sin().sum()

    def formula(x):
        return by_formula(layer, x, None, "silu", [2, 2, 1]).sin().sum()

    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(formula)(x))
    for found, wanted in zip(*(torch.func.jvp(f, (x,), (tangent,)) for f in (ours, formula)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 130), (6, 3, 2, 2)], ids=str)
def test_only_what_needs_a_gradient_gets_one(shape):
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    layer = layer_for(3, 2, torch.float32)
    layer.weight.requires_grad_(False)
    layer(x.detach(), residual, activation="relu").sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, (residual.grad != 0).sum([0, *range(2, x.dim())]).float())
    layer.bias.requires_grad_(False)
    assert not layer(x.detach(), residual.detach()).requires_grad


def test_a_residual_of_another_dtype():
    x, residual = torch.randn(6, 3, 130).bfloat16(), torch.randn(6, 3, 130, requires_grad=True)
    layer = layer_for(3, 2, torch.float32)
    y = layer(x, residual, activation="relu")
    assert y.dtype == torch.float32
    y.sum().backward()
    assert residual.grad.dtype == torch.float32
    expected = by_formula(layer, x.float(), residual, "relu", 2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_what_is_infinite_stays_in_its_group_and_out_of_the_running_statistics():
    x = torch.randn(6, 3, 130)
    clean = layer_for(3, 2, torch.float32)
    poisoned = copy.deepcopy(clean)
    expected = clean(x)
    x[2, 1, 5] = torch.inf
    y = poisoned(x)
    assert torch.equal(y[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
    assert y[2:4, 1].isnan().any()
    assert torch.equal(poisoned.running_mean[[0, 2]], clean.running_mean[[0, 2]])
    assert poisoned.running_mean[1] == 0
    assert poisoned.running_var[1] == 1


def test_an_empty_batch_changes_nothing():
    layer = GhostBatchNorm(3, 2)
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.eq(0).all()
    assert layer.num_batches_tracked == 0
    assert layer.running_mean.eq(0).all()


def test_errors():
    layer = GhostBatchNorm(3, 1)
    with pytest.raises(ValueError, match=r"ghost_size=1.*larger ghost_size"):
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    for size in (0, -2, 1.5, "8"):
        with pytest.raises(ValueError, match="ghost_size must be an integer"):
            GhostBatchNorm(3, size)
    with pytest.raises(ValueError, match=r"update must be one of \('pooled', 'sequential'\)"):
        GhostBatchNorm(3, 2, update="mean")


def test_merging_rows_is_merging():
    x = torch.randn(7, 4, dtype=torch.float64) + 1e6
    parts = [kn.Moments.from_tensor(part) for part in x.split([1, 2, 4])]
    count, mean, m2 = (torch.stack([getattr(p, name) for p in parts]) for name in ("count", "mean", "m2"))
    rows = kn.Moments(count[:, None], mean, m2)
    expected = kn.Moments.merge_all(parts)
    found = consecutive_groups.merge_rows(rows)
    assert found.count == expected.count
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(found.m2, expected.m2, rtol=1e-9, atol=0.0)
