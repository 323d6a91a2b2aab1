"""layer(x, mask=...): the moments, the result and every gradient are those of the values that count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import keelnorm as kn

SHAPES = [(7, 5), (4, 6, 9), (3, 5, 4, 5), (2, 20, 3, 3, 2), (3, 64, 21), (5, 3, 700)]
ACTIVATIONS = [None, "relu", "silu"]


def problem(shape, channels_last=False, dtype=torch.float64):
    x, residual, dy = (torch.randn(shape, dtype=dtype) for _ in range(3))
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    mask.view(-1)[:3] = True
    if channels_last:
        x, residual, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual, dy))
    return x, residual, dy, mask


def definition(x, residual, weight, bias, mask, keep, activation, eps=1e-5):
    """Gather the values that count, normalize those by the definition, and put them back."""
    rows = x.movedim(1, -1)
    counted = rows[mask]  # (values, C)
    mean = counted.mean(0)
    var = (counted - mean).square().mean(0)
    y = (counted - mean) / (var + eps).sqrt() * weight + bias
    if residual is not None:
        y = y + residual.movedim(1, -1)[mask]
    y = {"relu": F.relu, "silu": F.silu, None: lambda v: v}[activation](y)
    result = (rows if keep else torch.zeros_like(rows)).clone()
    result[mask] = y
    return result.movedim(-1, 1), mean, counted.var(0, unbiased=True)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_moments_and_gradients(shape, channels_last, activation, with_residual, padding, native):
    x, residual, dy, mask = problem(shape, channels_last)
    residual = residual if with_residual else None
    layer = kn.BatchNorm(shape[1], dtype=torch.float64)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    x, residual = (None if t is None else t.detach().requires_grad_() for t in (x, residual))
    inputs = [t for t in (x, residual) if t is not None]
    expected, mean, unbiased = definition(x, residual, layer.weight, layer.bias, mask, padding == "keep", activation)
    expected_gradients = torch.autograd.grad(expected, [*inputs, layer.weight, layer.bias], dy)
    # What does not count may be anything.
    holes = ~mask.unsqueeze(1)
    poisoned = [torch.where(holes, torch.nan, t.detach()).requires_grad_() for t in inputs]
    if padding == "keep":
        poisoned[0] = x.clone().requires_grad_()
    with kn.kernels.use("auto" if native else "reference"):
        y = layer(*poisoned, activation=activation, mask=mask, padding=padding)
        gradients = torch.autograd.grad(y, [*poisoned, layer.weight, layer.bias], dy)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * unbiased, rtol=1e-10, atol=1e-12)
    assert layer.num_batches_tracked == 1
    if channels_last and len(shape) == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes(dtype):
    x, _, dy, mask = problem((4, 6, 33), dtype=torch.float32)
    layer = kn.BatchNorm1d(6)
    expected, *_ = definition(x.to(dtype).double(), None, layer.weight, layer.bias, mask, False, "relu")
    y = layer(x.to(dtype).requires_grad_(), activation="relu", mask=mask)
    y.backward(dy.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_whole_samples():
    x = torch.randn(6, 3, 5)
    mask = torch.tensor([True, False, True, True, False, True])
    layer, other = kn.BatchNorm1d(3), kn.BatchNorm1d(3)
    torch.testing.assert_close(layer(x, mask=mask)[mask], other(x[mask]))
    torch.testing.assert_close(layer.running_var, other.running_var)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_a_batch_in_which_nothing_counts_changes_nothing(native):
    layer = kn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.full((4, 3, 5), torch.nan, requires_grad=True)
    with kn.kernels.use("auto" if native else "reference"):
        y = layer(x, mask=torch.zeros(4, 5, dtype=torch.bool))
        y.backward(torch.ones_like(y))
    assert (y == 0).all()
    assert (x.grad == 0).all()
    assert (layer.weight.grad == 0).all()
    assert (layer.bias.grad == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_evaluation_blanks_what_does_not_count():
    layer = kn.BatchNorm1d(3).eval()
    x, _, _, mask = problem((4, 3, 5), dtype=torch.float32)
    y = layer(x, mask=mask)
    torch.testing.assert_close(y, layer(x) * mask.unsqueeze(1))


def test_second_derivatives():
    x, _, _, mask = problem((3, 2, 4))
    layer = kn.BatchNorm1d(2, dtype=torch.float64, track_running_stats=False)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask=mask, activation="silu"), x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    x, _, dy, mask = problem((4, 3, 5), dtype=torch.float32)
    layer, other = kn.BatchNorm1d(3), kn.BatchNorm1d(3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend=backend)(a, mask=mask)
    expected = other(b, mask=mask)
    y.backward(dy), expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_a_checkpoint_counts_once():
    layer, other = kn.BatchNorm1d(3), kn.BatchNorm1d(3)
    x, _, dy, mask = problem((4, 3, 5), dtype=torch.float32)
    a = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda a: layer(a, mask=mask), a, use_reentrant=False).backward(dy)
    other(x, mask=mask)
    assert torch.equal(layer.running_mean, other.running_mean)
    assert layer.num_batches_tracked == 1


def test_lengths():
    assert kn.functional.length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
    ]


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        (torch.tensor([1.0]), TypeError),
        (torch.tensor([[1]]), ValueError),
        (torch.tensor([4]), ValueError),
        ([1], TypeError),
    ],
)
def test_illegal_lengths(lengths, error):
    with pytest.raises(error, match="length_mask: lengths must"):
        kn.functional.length_mask(lengths, 3)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, ValueError, "does not fit x"),
        ({"mask": torch.ones(4, 5)}, TypeError, "boolean"),
        ({"mask": torch.ones(4, 3, 5, dtype=torch.bool)}, ValueError, "same for all channels"),
        ({"mask": torch.ones(4, dtype=torch.bool), "padding": "none"}, ValueError, "padding must be one of"),
        ({"mask": torch.ones(4, dtype=torch.bool), "inplace": True}, ValueError, "inplace"),
        ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight must have shape"),
        ({"sample_weight": torch.ones(4, dtype=torch.int64)}, TypeError, "sample_weight must be a floating"),
        ({"sample_weight": -torch.ones(4)}, ValueError, "must not be negative, infinite or NaN; it has -1.0"),
        ({"sample_weight": torch.tensor([1, 1, 1, torch.inf])}, ValueError, "infinite or NaN; it has inf"),
        ({"sample_weight": torch.tensor([1, torch.nan, 1, 1])}, ValueError, "infinite or NaN; it has nan"),
        ({"sample_weight": torch.ones(4).to_sparse()}, TypeError, "sample_weight must be an ordinary dense tensor"),
        ({"mask": torch.ones(4, dtype=torch.bool).to_sparse()}, TypeError, "the mask must be an ordinary dense tensor"),
    ],
)
def test_illegal_calls(keywords, error, words):
    layer = kn.BatchNorm1d(3)
    before = layer.running_var.clone()
    with pytest.raises(error, match=words) as caught:
        layer(torch.randn(4, 3, 5), **keywords)
    assert str(caught.value).startswith("BatchNorm1d: ")
    assert torch.equal(layer.running_var, before)
