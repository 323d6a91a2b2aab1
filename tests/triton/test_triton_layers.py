"""What a layer promises, on Triton's kernels: masks, control of statistics, activations, memory, variants."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.cases import laid_out
from torch import nn

import keelnorm as kn
from keelnorm.engine.activations import NAMED, TABLE
from keelnorm.engine.kernels import reference, triton

pytestmark = pytest.mark.triton

#: On chip, and walked over by several programs.
SHAPES = [(6, 5, 4, 7), (30, 2, 21, 29)]
LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("name", [name for name in NAMED if name], ids=str)
def test_activations_and_their_derivatives(device, name):
    operators = triton.load()
    act = NAMED[name]
    v = torch.cat(
        [torch.linspace(-40, 40, 401), torch.linspace(-1, 1, 101) * 1e-3, torch.tensor([0.0, 3.0, -3.0, 6.0])]
    )
    x = v.to(device).view(-1, 1)
    one, zero = torch.ones(1, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.float64, device=device)
    y = operators.apply(x, zero, one, None, None, None, *act[1:]).cpu().double().flatten()
    right = act.forward(v.double())
    # 1 + erf(v) and 1 + tanh(v) cancel where v is negative: there torch errs by a rounding of 1 too.
    cancels = 2e-7 * v.abs() if name.startswith("gelu") else 0.0
    assert ((y - right).abs() <= 4e-6 * right.abs() + cancels + 1e-30).all()
    dx = operators.grad_input(torch.ones_like(x), x, zero, one, None, None, None, None, None, *act[1:])
    slope = act.gradient(torch.ones_like(v).double(), v.double())
    assert ((dx.cpu().double().flatten() - slope).abs() <= 2e-6 * slope.abs().clamp(min=0.1) + 5 * cancels).all()


@pytest.mark.parametrize("code", [-1, len(TABLE)])
def test_an_unknown_activation_is_refused(device, code):
    x, vector = torch.randn(4, 3, device=device), torch.ones(3, dtype=torch.float64, device=device)
    operators = triton.load()
    with pytest.raises(NotImplementedError, match="unsupported: activation"):
        operators.apply(x, vector, vector, None, None, None, code, 0.0, 0.0)
    with pytest.raises(NotImplementedError, match="unsupported: activation"):
        operators.invert(x, torch.ones(3, 3, dtype=torch.float64, device=device), None, None, 1, 0.0, 0.0)
    operators.stats(x, None)  # the fixture expects a call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", ["zero", "keep"])
def test_masks(device, shape, layout, padding):
    x, dy = (laid_out(torch.randn(shape), layout) for _ in range(2))
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    x[~mask.unsqueeze(1).expand(shape)] = math.nan if padding == "zero" else 7.0
    layer = kn.BatchNorm2d(shape[1]).to(device)
    nn.init.uniform_(layer.weight)
    clean = torch.where(mask.unsqueeze(1), x, 0.0 if padding == "zero" else x)
    right_y, right_dx, after = masked_reference(layer, clean, dy, mask, padding)
    leaf = x.to(device).requires_grad_()
    y = layer(leaf, mask=mask.to(device), activation="relu", padding=padding)
    (dx,) = torch.autograd.grad(y, leaf, dy.to(device))
    assert torch.allclose(y.detach().cpu().double(), right_y, atol=1e-5)
    assert torch.allclose(dx.cpu().double(), right_dx, atol=1e-5)
    assert torch.allclose(layer.running_mean.cpu().double(), after[0], atol=1e-5)
    assert torch.allclose(layer.running_var.cpu().double(), after[1], atol=1e-5)
    assert layer.num_batches_tracked.item() == 1


def masked_reference(layer, x, dy, mask, padding):
    """The definition over the values that count, in float64."""
    values = x.double().requires_grad_()
    kept = values.movedim(1, -1)[mask]
    weight, bias = layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()
    normal = (kept - kept.mean(0)) / (kept.var(0, correction=0) + layer.eps).sqrt() * weight + bias
    start = values.movedim(1, -1) if padding == "keep" else torch.zeros_like(values.movedim(1, -1))
    y = start.masked_scatter(mask.unsqueeze(-1).expand_as(start), normal.relu()).movedim(-1, 1)
    (dx,) = torch.autograd.grad(y, values, dy.double())
    new = 0.1 * kept.mean(0), 0.9 + 0.1 * kept.var(0)
    return y.detach(), dx, [each.detach() for each in new]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_channel_that_is_not_finite_keeps_its_running_moments(device, shape, bad):
    layer = kn.BatchNorm2d(shape[1]).to(device)
    x = torch.randn(shape).to(device)
    x[1, 1, 0, 0] = bad
    layer(x)
    assert layer.skipped_updates.tolist() == [channel == 1 for channel in range(shape[1])]
    assert layer.running_mean[1].item() == 0
    assert layer.running_var[1].item() == 1
    kept = x[:, 0].double().mean() * 0.1
    assert layer.running_mean[0].item() == pytest.approx(kept.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_that_was_left_out_does_not_weigh_in_an_average(device, shape, masked):
    layer = kn.BatchNorm2d(shape[1], momentum=None).to(device)
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    given = [torch.randn(shape) * 3 + k for k in range(4)]
    for k, x in enumerate(given):
        if k % 2 == 0:
            x[1, 1, 0, 0] = math.nan
        layer(x.to(device), **({"mask": mask.to(device)} if masked else {}))
    assert layer.num_batches_tracked.item() == 4
    assert layer.skipped_updates.tolist() == [2 * (channel == 1) for channel in range(shape[1])]
    for channel in (0, 1):
        taken = [x[:, channel].double() for x in given if x[:, channel].isfinite().all()]
        mean, var = (sum(f(x).item() for x in taken) / len(taken) for f in (torch.mean, torch.var))
        assert layer.running_mean[channel].item() == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert layer.running_var[channel].item() == pytest.approx(var, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_stored_is_finite(device, shape):
    layer = kn.BatchNorm2d(shape[1]).half().to(device)
    x = torch.randn(shape).half()
    x[0, 0, 0, 0] = 30000
    layer(x.to(device))
    count = x.numel() // shape[1]
    left_out = 0.1 * 30000**2 / count > 65520
    assert layer.skipped_updates.tolist() == [int(left_out and channel == 0) for channel in range(shape[1])]
    assert layer.running_var.isfinite().all()
    assert (layer.running_var[0].item() == 1) == left_out


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_running_moments_over_several_batches(device, shape, momentum):
    ours, theirs = kn.BatchNorm2d(shape[1], momentum=momentum).to(device), nn.BatchNorm2d(shape[1], momentum=momentum)
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        ours(x.to(device))
        theirs(x)
    assert ours.num_batches_tracked.item() == 3
    assert torch.allclose(ours.running_mean.cpu(), theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var.cpu(), theirs.running_var, rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "leaky_relu", "elu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(device, shape, activation):
    layer = kn.BatchNorm2d(shape[1]).to(device)
    x, dy = torch.randn(shape).to(device), torch.randn(shape).to(device)
    plain = x.clone().requires_grad_()
    y = layer(plain, activation=activation)
    right = torch.autograd.grad(y, [plain, layer.weight, layer.bias], dy)
    leaf = x.clone().requires_grad_()
    given = leaf * 1.0
    memory = given.data_ptr()
    found = layer(given, activation=activation, inplace=True)
    assert found.data_ptr() == memory
    assert torch.equal(found, y)
    for a, b in zip(torch.autograd.grad(found, [leaf, layer.weight, layer.bias], dy), right, strict=True):
        assert torch.allclose(a, b, atol=2e-4 if b.dim() == 1 else 2e-5)


@pytest.mark.parametrize("activation", [None, "leaky_relu", "elu"])
@pytest.mark.parametrize("training", [True, False])
def test_in_place_where_float16_overflows(device, training, activation):
    """Such channels keep x: by the weight, and by the bias on top of it."""
    layer = kn.BatchNorm2d(3).to(device).train(training)
    with torch.no_grad():
        layer.weight[:2], layer.bias[1] = torch.tensor([4e4, 2e4], device=device), 5e4
    x, dy = torch.randn(16, 3, 4, 4).half().to(device), (torch.randn(16, 3, 4, 4) / 1024).half().to(device)
    found = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        y = copy.deepcopy(layer)(leaf.clone(), activation=activation, inplace=inplace)
        found.append((y.detach().clone(), torch.autograd.grad(y, leaf, dy)[0]))
    (y, dx), (right_y, right_dx) = found
    assert torch.equal(y, right_y)
    assert y.isinf().any()
    assert right_dx.isfinite().all()
    scale = right_dx.double().abs().amax((0, 2, 3), keepdim=True)
    assert ((dx.double() - right_dx.double()).abs() <= 0.05 * scale).all()


def test_in_place_where_x_is_the_largest_number(device):
    """What y's rounding adds to x must not make it infinite."""
    largest = torch.finfo(torch.float16).max
    operators = triton.load()
    saved = torch.tensor([[6e4], [1e6], [1e-3]], dtype=torch.float64, device=device)
    y = torch.tensor([[(65530.0 - 6e4) * 1e-3], [-65530e-3 - 60], [torch.nan]], device=device).half()
    x = operators.invert(y, saved, None, None, 0, 0.0, 0.0).flatten().cpu()
    assert x[0] == largest
    assert x[1] == -largest
    assert x[2].isnan()


def test_a_mask_of_any_byte(device):
    x = torch.randn(6, 3, 5).to(device)
    mask = torch.rand(6, 5) < 0.6
    other = torch.where(mask, torch.randint(1, 256, mask.shape), 0).to(torch.uint8).view(torch.bool)
    results = []
    for said in (mask, other):
        layer = kn.BatchNorm1d(3).to(device)
        results.append([layer(x, mask=said.to(device)), *layer.buffers()])
    for found, right in zip(*results, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "running_mean", "running_var"])
def test_freed_memory_is_refused(device, name):
    layer = kn.BatchNorm1d(3).to(device)
    x, residual = torch.randn(4, 3).to(device), torch.randn(4, 3).to(device)
    layer(x, residual)
    given = {"x": x, "residual": residual, **dict(layer.named_parameters()), **dict(layer.named_buffers())}
    before = {key: t.clone() for key, t in given.items() if key != name}
    given[name].untyped_storage().resize_(0)
    state = layer.running_mean, layer.running_var, layer.num_batches_tracked, True, True, 0.1, 1e-5
    with pytest.raises(RuntimeError, match=f"the memory of {name} is gone"):
        triton.load().forward_(x, residual, layer.weight, layer.bias, *state, 0, 0.0, 0.0)
    for key, t in before.items():
        assert torch.equal(given[key], t), key


def test_only_what_is_asked_for_is_computed(device):
    for shape in SHAPES:
        layer = kn.BatchNorm2d(shape[1]).to(device)
        x = torch.randn(shape).to(device)
        dy = torch.randn(shape).to(device)
        leaf = x.clone().requires_grad_()
        everything = torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], dy)
        assert torch.equal(torch.autograd.grad(layer(x), layer.weight, dy)[0], everything[1])
        kn.freeze(layer, statistics=False)
        assert torch.equal(torch.autograd.grad(layer(leaf), leaf, dy)[0], everything[0])


VARIANTS = {
    "ghost": lambda: kn.GhostBatchNorm(5, 2),
    "renorm": lambda: kn.BatchRenorm(5),
    "split": lambda: kn.SplitBatchNorm(5, 2),
    "moving average": lambda: kn.MovingAverageBatchNorm(5),
    "conditional": lambda: kn.ConditionalBatchNorm(5, 3),
    "domain": lambda: kn.DomainBatchNorm(5, 2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_those_on_the_cpu(device, name):
    layer = VARIANTS[name]()
    extra = {
        "conditional": {"condition": torch.tensor([0, 1, 2, 0, 1, 2])},
        "domain": {"domain": torch.tensor([0, 1, 0, 1, 1, 1])},
    }.get(name, {})
    x, dy = torch.randn(6, 5, 4, 4), torch.randn(6, 5, 4, 4)
    other = copy.deepcopy(layer)
    leaf = x.to(device).requires_grad_()
    y = layer.to(device)(leaf, **{key: value.to(device) for key, value in extra.items()})
    (dx,) = torch.autograd.grad(y, leaf, dy.to(device))
    with kn.kernels.use("auto"):
        again = x.clone().requires_grad_()
        right = other(again, **extra)
        (right_dx,) = torch.autograd.grad(right, again, dy)
    assert torch.allclose(y.cpu(), right, atol=1e-5)
    assert torch.allclose(dx.cpu(), right_dx, atol=1e-5)


def test_an_unusual_argument_is_declined_and_said(device, caplog, monkeypatch):

    from keelnorm.engine import fast_operators

    monkeypatch.setattr(fast_operators, "_announced", set())
    layer = kn.BatchNorm1d(3).to(device)
    x = torch.randn(5, 3).to(device)
    right = layer(x)
    calls = kn.kernels.calls()
    y = layer(x, torch.zeros(5, 3, dtype=torch.float64).to(device))
    assert torch.allclose(y.float(), right, atol=1e-6)
    assert kn.kernels.calls()["reference"] > calls["reference"]
    assert "do not take this dtype or layout of residual" in caplog.text
    reference.calls = calls["reference"]  # the fixture is told that this was meant
