"""Tensors larger than the last cache, whose results the native kernels store past it.

What is written value by value has the same bits as for its samples one by one, which are small.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.cases import EPS, MOMENTUM, laid_out
from support.definition import UNIT, moments, over, rms
from support.forcing import NATIVE
from support.operators import RELU

LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
MOST_BYTES = 64 * 2**20

# (C, S), layout: planes at every alignment; few channels, cut into segments; rows of whole vectors, and not.
CASES = {
    "planes": ((67, 41, 53), "contiguous"),
    "segments": ((3, 301, 403), "contiguous"),
    "whole rows": ((64, 41, 53), "channels_last"),
    "broken rows": ((67, 41, 53), "channels_last"),
}


def bytes_stored_past_the_cache():
    """Results from this size on are; see cache_bytes in register.cpp."""
    cache = int(LAST_CACHE.read_text().rstrip("K\n")) * 1024 if LAST_CACHE.exists() else 32 * 2**20
    return cache // 2 + 1


@pytest.fixture(params=CASES)
def large(request):
    """x, dy, residual and vectors, just large enough."""
    sample, layout = CASES[request.param]
    values = sample[0] * sample[1] * sample[2]
    samples = bytes_stored_past_the_cache() // (4 * values) + 1
    if 4 * samples * values > MOST_BYTES:
        pytest.skip(f"the last cache is so large that a tensor would take {4 * samples * values >> 20} MB")
    x, dy, residual = (laid_out(torch.randn(samples, *sample), layout) for _ in range(3))
    return x.add_(100), dy, residual, torch.randn(sample[0]), torch.randn(sample[0])


def by_sample(operator, *tensors):
    """Run the operator on each sample alone; arguments without a batch dimension are passed unchanged."""
    parts = [operator(*(t[n : n + 1] for t in tensors)) for n in range(len(tensors[0]))]
    return torch.cat(parts)


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
def test_large_tensors(kernel, large):
    x, dy, residual, weight, bias = large
    four = torch.ops.keelnorm
    running = torch.zeros_like(weight), torch.ones_like(weight)
    y, saved = four.forward_(x, residual, weight, bias, *running, None, True, True, MOMENTUM, EPS, *RELU)
    mean, var, rstd = saved
    right_mean, right_var = moments(x)
    assert bool(((mean - right_mean).abs() <= 16 * UNIT * right_var.sqrt()).all())
    assert bool(((var - right_var).abs() <= 16 * UNIT * right_var).all())
    assert torch.equal(running[0], (MOMENTUM * mean).float())
    assert torch.equal(y, by_sample(lambda x, r: four.apply(x, mean, rstd, weight, bias, r, *RELU), x, residual))

    dx, dresidual, dweight, dbias = four.backward(
        dy, x, saved, weight, bias, y, None, True, *RELU, True, True, True, True
    )
    g = torch.where(y > 0, dy, 0)
    assert torch.equal(dresidual, g)
    count = x.numel() // x.shape[1]
    assert bool(((dbias - g.sum(over(x), dtype=torch.float64)).abs() <= 16 * UNIT * count * rms(g)).all())
    sums = four.grad_stats(dy, x, mean, rstd, weight, bias, y, None, *RELU)
    assert torch.equal(sums.float(), torch.stack([dbias, dweight]))
    means = sums / count
    alone = by_sample(
        lambda dy, x, y: four.grad_input(dy, x, mean, rstd, weight, bias, y, None, means, *RELU), dy, x, y
    )
    assert torch.equal(four.grad_input(dy, x, mean, rstd, weight, bias, y, None, means, *RELU), alone)
    torch.testing.assert_close(dx, alone, rtol=8 * UNIT, atol=8 * UNIT * rms(alone).max().item())
