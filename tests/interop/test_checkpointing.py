"""Activation checkpointing: a batch is counted once, with the gradients and running statistics of the plain model."""

import pytest
import torch
from interop.interop_models import SHAPE, assert_same, step, twins
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import keelnorm as kn

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with kn.kernels.use(request.param):
        yield request.param


@reentrant
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_same_bits_as_the_plain_model(momentum, training, use_reentrant, backend):
    plain, other = (block.train(training) for block in twins(momentum=momentum))
    for count in (1, 2, 3):
        x = torch.randn(SHAPE)
        found = step(lambda x: checkpoint(other, x, use_reentrant=use_reentrant), x, other)
        assert_same(found, step(plain, x))
        assert other.norm.num_batches_tracked.item() == (count if training else 0)


@reentrant
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, use_reentrant):
    """Dtypes other than float32."""
    plain, other = (block.to(dtype) for block in twins())
    x = torch.randn(SHAPE, dtype=dtype)
    assert_same(step(lambda x: checkpoint(other, x, use_reentrant=use_reentrant), x, other), step(plain, x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # the inner one, at first
@reentrant
def test_nested(use_reentrant, backend):
    """A checkpoint within a checkpoint runs its forward three times, and counts one."""
    plain, other = twins()

    def inner(h):
        return other.norm(other.conv(h), h, activation="relu")

    def outer(x):
        return checkpoint(inner, checkpoint(other.stem, x, use_reentrant=use_reentrant), use_reentrant=use_reentrant)

    x = torch.randn(SHAPE)
    found = step(lambda x: checkpoint(outer, x, use_reentrant=use_reentrant), x, other)
    assert_same(found, step(plain, x))
    assert other.norm.num_batches_tracked.item() == other.stem[1].num_batches_tracked.item() == 1


@reentrant
def test_checkpoint_sequential(use_reentrant):
    def network():
        torch.manual_seed(0)
        layers = [module for _ in range(3) for module in (nn.Linear(4, 4), kn.BatchNorm1d(4), nn.ReLU())]
        return nn.Sequential(*layers)

    plain, other = network(), network()
    x = torch.randn(8, 4)
    found = step(lambda x: checkpoint_sequential(other, 3, x, use_reentrant=use_reentrant), x, other)
    assert_same(found, step(plain, x))


@reentrant
def test_two_checkpoints_before_one_backward(use_reentrant):
    """Recomputation comes in another order than the forwards; each batch has been counted by then."""
    plain, other = twins()
    xs = [torch.randn(SHAPE, requires_grad=True) for _ in range(2)]
    ys = [checkpoint(other, x, use_reentrant=use_reentrant) for x in xs]
    counted = {name: value.clone() for name, value in other.named_buffers()}
    sum(y.square().sum() for y in ys).backward()
    expected = [plain(x.detach()) for x in xs]
    for name, value in other.named_buffers():
        assert torch.equal(value, counted[name]), name
        assert torch.equal(value, plain.get_buffer(name)), name
    assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


def test_counts_again_after_a_backward(backend):
    """What marks a recomputation is that it runs within a backward, and that is over afterwards."""
    layer = kn.BatchNorm2d(3)
    for count in (1, 2):
        x = torch.randn(SHAPE, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer(x)
        assert layer.num_batches_tracked.item() == 2 * count


class Tagged(torch.Tensor):
    """A subclass of Tensor that changes nothing."""


def test_subclass():
    layer = kn.BatchNorm2d(3)
    x = torch.randn(SHAPE).as_subclass(Tagged).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked.item() == 1
