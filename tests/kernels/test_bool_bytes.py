"""A boolean mask whose bytes are not 0 and 1, as a view of an image mask's: any byte but 0 is True."""

from __future__ import annotations

import pytest
import torch
from support.cases import laid_out

import keelnorm as kn

SHAPES = [(5, 19), (4, 5, 33), (3, 67, 7, 7), (2, 3, 130, 131)]
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def masks(shape):
    """A mask and one that says the same by other bytes: runs of both, and single values; every byte there is."""
    size = (shape[0], *shape[2:])
    plain = torch.rand(size) < 0.6
    plain.view(-1)[[0, -1]] = True
    plain[-1].view(-1)[2:] = False
    other = torch.where(plain, torch.randint(1, 256, size, dtype=torch.uint8), 0)
    other.view(-1)[0], other.view(-1)[-1] = 255, 2
    plain.view(-1)[-1] = True
    return plain, other.view(torch.bool)


def results(x, dy, mask, padding, training):
    """y, all gradients, the buffers and the moments."""
    torch.manual_seed(0)
    layer = kn.BatchNorm(x.shape[1]).train(training)
    torch.nn.init.normal_(layer.weight)
    x = x.detach().requires_grad_()
    y = layer(x, activation="silu", mask=mask, padding=padding)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    moments = kn.functional.moments(x.detach(), mask)
    return [y, *gradients, *layer.buffers(), moments.count, moments.mean, moments.m2]


@pytest.mark.parametrize(("training", "padding"), [(True, "zero"), (True, "keep"), (False, "zero")])
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_byte_but_0(kernel, shape, layout, padding, training):
    """The same bits as with a mask of zeros and ones."""
    x, dy = (laid_out(torch.randn(shape), layout) for _ in range(2))
    plain, other = masks(shape)
    assert set(other.view(torch.uint8).unique().tolist()) - {0, 1}
    for found, right in zip(
        results(x, dy, other, padding, training), results(x, dy, plain, padding, training), strict=True
    ):
        assert torch.equal(found, right)


def test_an_image_mask():
    """0 and 255, as files of masks have them."""
    x = torch.tensor([1.0, 2.0, 9.0, 900.0]).view(1, 1, 4)
    mask = torch.frombuffer(bytearray([255, 255, 255, 0]), dtype=torch.uint8).view(torch.bool).view(1, 4)
    layer = kn.BatchNorm1d(1, momentum=1.0)
    y = layer(x, mask=mask)
    assert layer.running_mean.item() == 4.0
    assert layer.running_var.item() == 19.0
    torch.testing.assert_close(y[0, 0, :3], (x[0, 0, :3] - 4) / (38 / 3 + layer.eps) ** 0.5)
    assert y[0, 0, 3] == 0
    assert kn.functional.moments(x, mask).count.item() == 3


@pytest.mark.parametrize("size", [1, 8, 9, 17])
def test_runs_of_every_length(kernel, size):
    """A run begins and ends at every place of a plane, and at both of its ends."""
    x = torch.randn(1, 2, size)
    for begin in range(size):
        for end in range(begin + 1, size + 1):
            mask = torch.zeros(1, size, dtype=torch.uint8)
            mask[0, begin:end] = 200
            moments = kn.functional.moments(x, mask.view(torch.bool))
            right = kn.Moments.from_tensor(x[..., begin:end])
            torch.testing.assert_close(moments.mean, right.mean, rtol=0, atol=1e-6)
            torch.testing.assert_close(moments.m2, right.m2, rtol=1e-5, atol=1e-5)
