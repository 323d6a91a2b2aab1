"""Gradients of one large batch, from micro-batches one at a time, against the large batch itself."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from control.models import Block, Foreign, Plain, buffers, data, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.control import accumulate_statistics, backward_as_one_batch, freeze, pause_statistics

WEIGHTS = torch.linspace(0.2, 2, 12)


def loss_of(model, x, weights):
    """Not symmetric in the samples, so that no sum in the backward vanishes by itself."""
    y = model(x)
    return (weights.view(-1, *([1] * (y.dim() - 1))) * (y.sin() + y.pow(3))).sum() / 12


def both(model, x, sizes, weights=WEIGHTS):
    """The model after one large batch, and a copy after micro-batches."""
    x, weights = x.to(next(model.parameters()).dtype), weights.to(x.device)
    other = copy.deepcopy(model)
    loss = loss_of(model, x, weights)
    loss.backward()
    parts = list(zip(x.split(sizes), weights.split(sizes), strict=True))
    found = backward_as_one_batch(other, lambda part: loss_of(other, *part), parts)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-5 if x.dtype == torch.float32 else 1e-10, atol=0)
    return model, other


def assert_same_gradients(model, other, tolerance):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
        else:
            torch.testing.assert_close(q.grad, p.grad, rtol=tolerance, atol=tolerance, msg=name)


def assert_same_buffers(model, other, tolerance):
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", ["torch", "keelnorm"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 8, 3], [1] * 12, [12]], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_in_double(kind, rank, sizes, momentum):
    model, other = both(Block(rank, kind, momentum=momentum).double(), data(rank), sizes)
    assert_same_gradients(model, other, 1e-9)
    assert_same_buffers(model, other, 1e-10)
    assert other.norm.num_batches_tracked.item() == 1
    assert "forward" not in vars(other.norm)


@pytest.mark.parametrize("kind", ["torch", "keelnorm"])
def test_in_single(kind):
    model, other = both(Block(2, kind), data(2), [4, 4, 4])
    assert_same_gradients(model, other, 1e-4)
    assert_same_buffers(model, other, 1e-5)


def test_micro_batches_give_another_gradient_without_it():
    model, x = Block(2, "keelnorm").double(), data(2).double()
    other = copy.deepcopy(model)
    loss_of(model, x, WEIGHTS).backward()
    for part, weights in zip(x.split(4), WEIGHTS.split(4), strict=True):
        loss_of(other, part, weights).backward()
    assert (model.first.weight.grad - other.first.weight.grad).norm() > 0.05 * model.first.weight.grad.norm()


class Deep(nn.Module):
    """Branches, a residual, a fused activation, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = kn.Sequential(nn.Conv2d(4, 4, 3, padding=1), kn.BatchNorm2d(4), nn.SiLU())
        self.right = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh())
        self.join = kn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.stem(x)
        h = self.join(self.left(h), self.right(h), activation="elu")
        h = self.join(2 * h * h)
        return self.head(h.mean((2, 3)))


def test_branches_residuals_and_a_layer_used_twice():
    model, other = both(Deep().double(), data(2), [5, 1, 6])
    assert_same_gradients(model, other, 1e-9)
    assert_same_buffers(model, other, 1e-10)
    assert other.join.num_batches_tracked.item() == 2


def test_inputs_of_different_sizes():
    """Which no large batch can hold; the definition, over all positions of all of them, can."""
    layer = nn.BatchNorm1d(3).double()
    parts = [torch.randn(2, 3, size).double().requires_grad_() for size in (4, 7, 1)]
    backward_as_one_batch(layer, lambda part: layer(part).pow(3).sum(), parts)
    found = [part.grad.clone() for part in parts]
    together = torch.cat([part.detach().transpose(0, 1).flatten(1) for part in parts], 1).T.requires_grad_()
    F.batch_norm(together, None, None, training=True).pow(3).sum().backward()
    expected = torch.cat([grad.transpose(0, 1).flatten(1) for grad in found], 1).T
    torch.testing.assert_close(expected, together.grad, rtol=1e-9, atol=1e-10)


def test_dropout_is_repeated():
    """Each pass draws the same numbers, so the gradient is that of one fixed network; checked by differences."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.double()
    x = data(1).double()

    def total(seed=3):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(seed)
        parts = list(zip(x.split(4), WEIGHTS.split(4), strict=True))
        return backward_as_one_batch(model, lambda part: loss_of(model, *part), parts).item()

    total()
    gradient = model[0].weight.grad[1, 2].item()
    weight = model[0].weight.detach()
    weight[1, 2] += 1e-5
    above = total()
    weight[1, 2] -= 2e-5
    below = total()
    assert gradient == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_frozen_and_paused_layers():
    model = Block(2, "keelnorm").double()
    model(data(2).double())
    freeze(model, where="norm")
    model, other = both(model, data(2), [4, 8])
    assert_same_gradients(model, other, 1e-9)
    assert_same_buffers(model, other, 1e-10)
    before = buffers(other)
    with pause_statistics(other):
        backward_as_one_batch(other, lambda x: other(x).square().mean(), data(2).double().split(4))
    assert same(buffers(other), before)


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_a_step_that_evaluates_too(library):
    layer, x = library.BatchNorm1d(3).double(), data(1).double()

    def step(layer, x):
        y = layer(x)
        with torch.no_grad():
            target = layer.eval()(x)
        layer.train()
        return (y - target).pow(3).sum()

    other = copy.deepcopy(layer)
    with pause_statistics(layer):
        step(layer, x).backward()
    backward_as_one_batch(other, lambda part: step(other, part), x.split(4))
    assert_same_gradients(layer, other, 1e-10)


MASKED = {
    "mask": {"mask": torch.arange(12) % 5 > 0},
    "mask by position": {"mask": torch.arange(12 * 7).view(12, 7) % 4 > 0},
    "mask, keep": {"mask": torch.arange(12 * 7).view(12, 7) % 4 > 0, "padding": "keep"},
    "weights": {"sample_weight": torch.arange(12) % 3 + 0.5},
    "both": {"mask": torch.arange(12) > 2, "sample_weight": (torch.arange(12 * 7).view(12, 7) % 3).float()},
    "residual": {"mask": torch.arange(12) % 5 > 0, "residual": torch.linspace(-1, 1, 12 * 3 * 7).view(12, 3, 7)},
    "in place": {"activation": "elu", "inplace": True},
}


@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 2, 9]], ids=str)
@pytest.mark.parametrize("arguments", MASKED.values(), ids=list(MASKED))
def test_every_argument_of_the_call(arguments, sizes):
    """The moments, the gradients and what enters the running statistics are those of the values that count."""
    layer, x = kn.BatchNorm1d(3).double(), torch.randn(12, 3, 7).double() * 3 + 1
    x[1] = torch.where(torch.tensor("mask" in arguments) & ~_counts(arguments)[1], torch.nan, x[1])
    given = {name: v.double() if torch.is_tensor(v) and v.dtype != torch.bool else v for name, v in arguments.items()}
    other, parts = copy.deepcopy(layer), []
    for index in torch.arange(12).split(sizes):
        parts.append((index, {name: v[index] if torch.is_tensor(v) else v for name, v in given.items()}))

    def loss_of(layer, values, index, arguments):
        y = layer(values * 1, **arguments)
        return (WEIGHTS[index].view(-1, 1, 1) * y.nan_to_num().pow(3)).sum()

    large, small = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = loss_of(layer, large, torch.arange(12), given)
    loss.backward()
    found = backward_as_one_batch(other, lambda part: loss_of(other, small[part[0]], *part), parts)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(small.grad.nan_to_num(), large.grad.nan_to_num(), rtol=1e-9, atol=1e-10)
    assert_same_gradients(layer, other, 1e-9)
    assert_same_buffers(layer, other, 1e-10)


def _counts(arguments):
    mask = arguments.get("mask", torch.ones(12, dtype=torch.bool))
    return (mask if mask.dim() == 2 else mask[:, None]).expand(12, 7).unsqueeze(1)


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_a_forward_on_the_instance_is_used_and_kept(library):
    """As tools set them around the layer's own, which they have taken before."""
    layer, x = library.BatchNorm1d(3).double(), data(1).double()
    calls = []

    def around(x):
        calls.append(x)
        return inner(x + 1) * 2

    large, inner = copy.deepcopy(layer), layer.forward
    layer.forward = around
    (large(x + 1) * 2).pow(3).sum().backward()
    backward_as_one_batch(layer, lambda part: layer(part).pow(3).sum(), x.split(4))
    assert layer.forward is around
    assert len(calls) > 3
    assert_same_gradients(large, layer, 1e-10)
    assert_same_buffers(large, layer, 1e-10)


def test_a_forward_that_calls_torchs_function():
    layer, x = nn.BatchNorm1d(3).double(), data(1).double()
    large = copy.deepcopy(layer)
    vars(layer)["forward"] = lambda x: F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    large(x).pow(3).sum().backward()
    backward_as_one_batch(layer, lambda part: layer(part).pow(3).sum(), x.split(4))
    assert_same_gradients(large, layer, 1e-10)


def test_what_would_be_the_micro_batchs_is_refused():
    layer, x = nn.BatchNorm1d(3), data(1)
    before = buffers(layer)
    outside = [
        lambda part: F.batch_norm(part, None, None, training=True),
        lambda part: kn.functional.batch_norm(part, None, None, training=True),
        nn.BatchNorm1d(3),
        kn.BatchNorm1d(3),
    ]
    for norm in outside:
        with pytest.raises(TypeError, match="normalizes by the batch outside of the model's layers"):
            backward_as_one_batch(layer, partial(lambda norm, part: norm(layer(part)).sum(), norm), x.split(4))
    vars(layer)["forward"] = lambda x: (x - x.mean(0)) / x.std(0) * layer.weight
    with pytest.raises(TypeError, match="the forward set on a BatchNorm1d does not end in batch normalization"):
        backward_as_one_batch(layer, lambda part: layer(part).sum(), x.split(4))
    assert same(buffers(layer), before)
    assert not layer._forward_hooks
    evaluated = nn.BatchNorm1d(3).eval()
    layer = nn.BatchNorm1d(3)
    backward_as_one_batch(layer, lambda part: evaluated(layer(part)).sum(), x.split(4))


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_one_value_in_all(library):
    layer = library.BatchNorm1d(3)
    before = buffers(layer)
    with pytest.raises(ValueError, match="BatchNorm1d: one value per channel, in all micro-batches together"):
        backward_as_one_batch(layer, lambda part: layer(part).sum(), [torch.randn(1, 3)])
    assert same(buffers(layer), before)


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_inside_accumulate(library):
    """The micro-batches together are one batch of the pool, once."""
    layer, x = library.BatchNorm1d(3), data(1)
    large = copy.deepcopy(layer)
    large(torch.cat([x, 2 * x]))
    with accumulate_statistics(layer) as accumulated:
        backward_as_one_batch(layer, lambda part: layer(part).pow(3).sum(), x.split(4))
        assert accumulated.moments[""].count.max().item() == 12
        layer(2 * x)
    assert_same_buffers(large, layer, 1e-5)


def test_gradients_add_up():
    layer, x = nn.BatchNorm1d(3), data(1)
    for count in (1, 2):
        backward_as_one_batch(layer, lambda part: layer(part).pow(3).sum(), x.split(4))
        if count == 1:
            first = layer.weight.grad.clone()
    torch.testing.assert_close(layer.weight.grad, 2 * first)


def test_errors():
    layer, x = nn.BatchNorm1d(3), data(1)
    before = buffers(layer)
    with pytest.raises(ValueError, match="there is no micro-batch"):
        backward_as_one_batch(layer, lambda part: layer(part).sum(), [])
    with pytest.raises(ValueError, match=r"one value that requires a gradient; got a float32 tensor of shape \(4, 3\)"):
        backward_as_one_batch(layer, layer, x.split(4))
    with pytest.raises(ValueError, match="one value that requires a gradient"):
        backward_as_one_batch(layer, lambda part: layer(part).sum().detach(), x.split(4))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        backward_as_one_batch(layer, lambda part: layer(part[..., None, None]).sum(), x.split(4))
    other = kn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="x must have 2 or 3 dimensions"):
        backward_as_one_batch(other, lambda part: other(part[..., None, None]).sum(), x.split(4))
    for foreign in (Plain(3), Foreign(3), nn.SyncBatchNorm(3)):
        with pytest.raises(TypeError, match=rf"0 is a {type(foreign).__name__}, which may not"):
            backward_as_one_batch(nn.Sequential(foreign), lambda part: part.sum(), x.split(4))
    with pytest.raises(RuntimeError, match="Leave checkpointing out"):
        backward_as_one_batch(
            layer, lambda part: checkpoint(layer, part.clone().requires_grad_(), use_reentrant=False).sum(), x.split(4)
        )
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are switched off"):
        backward_as_one_batch(layer, lambda part: layer(part).sum(), x.split(4))
    uses = iter([1, 1, 1, 2])
    with pytest.raises(RuntimeError, match="more often when it was called again"):
        backward_as_one_batch(layer, lambda part: sum(layer(part).sum() for _ in range(next(uses))), x.split(4))
    assert same(buffers(layer), before)
    assert layer.weight.grad is None
    assert "forward" not in vars(layer)
