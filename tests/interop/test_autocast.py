"""Autocast on the CPU: half-precision activations, float32 parameters and running statistics."""

import pytest
import torch
from interop.interop_models import SHAPE, Block, twins
from torch import nn

import keelnorm as kn


def run(block, x, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = block(x)
    y.float().square().mean().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in block.named_parameters()},
        **{name: buffer.clone() for name, buffer in block.named_buffers()},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block_is_as_near_to_float64_as_torchs(training, dtype):
    """conv, batch norm, ReLU, residual: the same dtypes as torch's, and no larger error."""
    ours, theirs = (block.train(training) for block in twins(ours=False))
    exact = Block(ours=False).double().train(training)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(SHAPE)
    found, reference = run(ours, x, dtype), run(theirs, x, dtype)
    x64 = x.double().requires_grad_()
    y64 = exact(x64)
    y64.square().mean().backward()
    expected = {
        "y": y64.detach(),
        "x": x64.grad,
        **{name: p.grad for name, p in exact.named_parameters()},
        **dict(exact.named_buffers()),
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == reference[name].dtype, name
        largest = max(1.0, expected[name].double().abs().max().item())
        error = (value.double() - expected[name]).abs().max().item()
        theirs_error = (reference[name].double() - expected[name]).abs().max().item()
        # A value or two in half precision at the scale of the result, or a chance factor over torch's error.
        assert error <= max(2 * theirs_error, 4 * torch.finfo(dtype).eps * largest), name


def test_moments_and_gradients_stay_float32():
    block, _ = twins()
    found = run(block, torch.randn(SHAPE), torch.bfloat16)
    assert found.pop("y").dtype == torch.bfloat16
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {torch.float32}
    assert block.norm.num_batches_tracked.item() == 1


def test_layer_keeps_the_dtype_of_its_input():
    """Batch norm is on none of autocast's lists: it runs in the dtype that comes."""
    layer, oracle = kn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == oracle(x).dtype == torch.float32
        assert layer(x.bfloat16()).dtype == oracle(x.bfloat16()).dtype == torch.bfloat16
        y = layer(x.bfloat16(), x, activation="relu")
        assert y.dtype == torch.float32


def test_sequential():
    net = kn.Sequential(nn.Conv2d(3, 4, 1), kn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert (y >= 0).all()
