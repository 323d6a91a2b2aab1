"""BatchRenorm: limits, bounds, schedules, the paper's running deviation, and checkpoints."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from variants.cases_remedies import renorm, spread

import keelnorm as kn
from keelnorm.nn.renorm import PAPER_D_MAX, PAPER_R_MAX, BatchRenorm, LinearRamp

SHAPES = ((6, 3), (4, 3, 5), (4, 3, 5, 6))
FREE = {"r_max": torch.inf, "d_max": torch.inf}


def layer_for(channels=3, dtype=torch.float64, **keywords):
    layer = BatchRenorm(channels, dtype=dtype, **keywords)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.3, 3)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bounds", [{"r_max": 1, "d_max": 0}, {}], ids=["bounds of 1 and 0", "schedules at the start"])
def test_is_batch_norm_without_corrections(shape, bounds):
    layer = layer_for(dtype=torch.float32, **bounds)
    plain = kn.BatchNorm(3)
    plain.load_state_dict(layer.state_dict())
    x, residual, dy = torch.randn(3, *shape)
    outcomes = []
    for module in (layer, plain):
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0], residual, activation="relu")
        outcomes.append([y, *torch.autograd.grad(y, leaves, dy), *module.buffers()])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unclipped_values_are_those_of_evaluation(shape):
    """But gradients are not: they go through the batch's moments."""
    layer = layer_for(**FREE)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    evaluated = copy.deepcopy(layer).eval()(x)
    trained = layer(x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(x)
    by_training, by_evaluation = (torch.autograd.grad(y, x, dy)[0] for y in (trained, evaluated))
    assert (by_training - by_evaluation).abs().max() > 1e-2
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(by_training.sum(dims), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bounds", [(1.3, 0.4), (3.0, 5.0), (torch.inf, torch.inf)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, layout, with_residual, bounds):
    """Every gradient, with r and d constants for it."""
    x, residual, dy = torch.randn(3, *shape, dtype=torch.float64) * 2 + 1
    if layout == "channels last":
        x, residual, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual, dy))
    layer = layer_for(r_max=bounds[0], d_max=bounds[1])
    leaves = [x.requires_grad_(), *layer.parameters()]
    leaves += [residual.requires_grad_()] if with_residual else []
    v = renorm(layer, x)
    expected = torch.nn.functional.silu(v + residual if with_residual else v)
    y = layer(x, residual if with_residual else None, activation="silu")
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert y.stride() == torch.nn.functional.batch_norm(x, None, None, training=True).stride()
    outcomes = (torch.autograd.grad(value, leaves, dy) for value in (y, expected))
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_each_bound_is_reached():
    """A channel for each: r and d too large, too small, and within."""
    layer = BatchRenorm(5, r_max=2.0, d_max=1.0, eps=1e-12, dtype=torch.float64)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, 5) * torch.tensor([8, 0.01, 1, 1, 1.5]).double()
    x = x + torch.tensor([0, 0, 7, -7, 0.5], dtype=torch.float64)
    expected = torch.tensor([[-2, -0.5, -1 + 1, -1 - 1, -1.5 + 0.5], [2, 0.5, 1 + 1, 1 - 1, 1.5 + 0.5]]).double()
    torch.testing.assert_close(layer(x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**6, 3, 5),
    ],
)
def test_the_papers_schedules(step, r_max, d_max):
    layer = BatchRenorm(2, eps=1e-12, dtype=torch.float64)
    layer.num_batches_tracked.fill_(step)
    x = torch.tensor([[-1e4, 1e4 - 1], [1e4, 1e4 + 1]], dtype=torch.float64)  # r of 10⁴ and 1, d of 0 and 10⁴
    y = layer(x)
    torch.testing.assert_close(y[:, 0], torch.tensor([-r_max, r_max], dtype=torch.float64), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(y[:, 1], torch.tensor([d_max - 1.0, d_max + 1.0], dtype=torch.float64),
                               rtol=1e-6, atol=1e-6)  # fmt: skip
    assert PAPER_R_MAX(torch.tensor(step)).item() == pytest.approx(r_max)
    assert PAPER_D_MAX(torch.tensor(step)).item() == pytest.approx(d_max)


def test_nothing_is_read_out_of_a_tensor():
    """Fake tensors have no values: what asked for one, and would wait for a device, fails."""
    with FakeTensorMode():
        layer = BatchRenorm(3)
        layer.num_batches_tracked = torch.randint(9, ())  # the initial 0 would be known
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            layer.num_batches_tracked.item()
        y = layer(torch.randn(4, 3, 5, 5))
    assert y.shape == (4, 3, 5, 5)


def test_the_running_deviation():
    """σ ← σ + α(σ_B − σ) over several batches, and evaluation by σ."""
    layer = layer_for(average="std", momentum=0.2, eps=0.1, r_max=3.0, d_max=5.0)
    mean, sigma = layer.running_mean.clone(), (layer.running_var + 0.1).sqrt()
    for _ in range(4):
        x = torch.randn(5, 3, 4, dtype=torch.float64) * 2 + 1
        layer(x)
        mean = mean + 0.2 * (x.mean((0, 2)) - mean)
        sigma = sigma + 0.2 * ((x.var((0, 2), correction=0) + 0.1).sqrt() - sigma)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close((layer.running_var + 0.1).sqrt(), sigma)
    expected = (x - spread(mean, x)) / spread(sigma, x) * spread(layer.weight, x) + spread(layer.bias, x)
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_finds_its_corrections_again(use_reentrant):
    """The running statistics have moved when the backward runs the forwards again; several of them are under way."""
    layer = layer_for(momentum=0.5, **FREE)
    twin = copy.deepcopy(layer)
    batches = [torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    outcomes = []
    for module, again in ((layer, True), (twin, False)):
        ys = [checkpoint(module, x, use_reentrant=use_reentrant) if again else module(x) for x in batches]
        module.zero_grad()
        for x in batches:
            x.grad = None
        torch.stack(ys).pow(3).sum().backward()
        outcomes.append([*(t.grad.clone() for t in (*batches, *module.parameters())), *module.buffers()])
    assert all(torch.equal(found, expected) for found, expected in zip(*outcomes, strict=True))


def test_without_running_statistics_it_is_batch_norm():
    x = torch.randn(4, 3, 5)
    layer = BatchRenorm(3, track_running_stats=False, **FREE)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_an_empty_batch_changes_nothing():
    layer = layer_for(dtype=torch.float32, **FREE)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.empty(0, 3, 4, requires_grad=True)).sum().backward()
    assert layer.weight.grad.eq(0).all()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_half_precision_parameters():
    """weight·r and bias + weight·d are not rounded to them."""
    layer = layer_for(dtype=torch.bfloat16, r_max=3.0, d_max=5.0)
    x = torch.randn(8, 3, 6).bfloat16()
    expected = renorm(copy.deepcopy(layer).double(), x.double())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"r_max": 0.9}, {"r_max": "3"}, {"d_max": -1}, {"d_max": None},
                                   {"r_max": float("nan")}, {"average": "range"}], ids=str)  # fmt: skip
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=rf"BatchRenorm: {next(iter(wrong))} must be"):
        BatchRenorm(3, **wrong)


def test_a_ramp_needs_a_begin_before_its_end():
    with pytest.raises(ValueError, match="begin must be below end"):
        LinearRamp(1.0, 2.0, 10, 10)
