"""Kernels that round to bfloat16 by one instruction agree with kernels that round by integer arithmetic."""

from __future__ import annotations

import pytest
import torch
from support.forcing import require_kernel

import keelnorm as kn
from keelnorm.engine import ops  # noqa: F401  (registers the operators)

SHAPES = [(2, 3, 5), (5, 13, 3, 11), (3, 64, 7, 7), (64, 3), (2, 16, 17, 9)]


@pytest.fixture(autouse=True)
def _machine():
    require_kernel("avx512_bf16")


def _run(kernel: str, x: torch.Tensor, dy: torch.Tensor, activation: int) -> list[torch.Tensor]:
    weight, bias = torch.linspace(-1, 2, x.shape[1]), torch.linspace(-1, 1, x.shape[1])
    before = kn.kernels.calls()
    with kn.kernels.use(kernel):
        y, saved = torch.ops.keelnorm.forward(x, None, weight, bias, None, None, True, 1e-5, activation, 0.0, 0.0)
        gradients = torch.ops.keelnorm.backward(
            dy, x, saved, weight, bias, None, None, True, activation, 0.0, 0.0, True, False, True, True
        )
    after = kn.kernels.calls()
    assert {name for name in after if after[name] != before[name]} == {kernel}
    return [y, saved, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("activation", [0, 1, 5], ids=["none", "relu", "silu"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits(shape, channels_last, activation):
    x, dy = (torch.randn(shape).bfloat16() for _ in range(2))
    if channels_last and len(shape) == 4:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    got, expected = _run("avx512_bf16", x, dy, activation), _run("avx512", x, dy, activation)
    assert len(got) == len(expected) == 5
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_infinity_and_nan_pass():
    x = torch.tensor([[1.0, 2.0], [float("inf"), 3.0], [float("nan"), 5.0]]).bfloat16()
    mean, rstd = torch.zeros(2, dtype=torch.double), torch.ones(2, dtype=torch.double)
    with kn.kernels.use("avx512_bf16"):
        y = torch.ops.keelnorm.apply(x, mean, rstd, None, None, None, 0, 0.0, 0.0)
    assert y.isnan().tolist() == x.isnan().tolist()
    assert torch.equal(y[:2], x[:2])


def test_subnormal_results_are_zero_where_integers_would_keep_them():
    x = torch.full((32, 2), 1e-39).bfloat16()
    mean, rstd = torch.zeros(2, dtype=torch.double), torch.ones(2, dtype=torch.double)
    results = {}
    for kernel in ("avx512", "avx512_bf16"):
        with kn.kernels.use(kernel):
            results[kernel] = torch.ops.keelnorm.apply(x, mean, rstd, None, None, None, 0, 0.0, 0.0)
    assert torch.equal(results["avx512"], x)
    assert (results["avx512_bf16"] == 0).all()


def test_other_dtypes_take_the_plainer_set():
    before = kn.kernels.calls()
    with kn.kernels.use("avx512_bf16"):
        kn.functional.batch_norm(torch.randn(4, 3), None, None, training=True)
    after = kn.kernels.calls()
    assert {name for name in after if after[name] != before[name]} == {"avx512"}
