"""Memory that is not aligned to its elements: the same bits as from aligned memory, by every kernel, in place too."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import EPS, MOMENTUM, laid_out
from support.forcing import NATIVE
from support.operators import NONE, RELU
from support.unaligned import unaligned

import keelnorm as kn

OPERATORS = torch.ops.keelnorm
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SILU = (5, 0.0, 0.0)
# Lengths around vectors, and planes and rows of several.
SHAPES = [(2, 3), (3, 17, 5), (4, 33, 9, 7)]
#: More than half of the last cache, so that results are stored past it, where the page is there already.
LARGE = (4, 64, 112, 112)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
native = pytest.mark.parametrize("kernel", NATIVE, indirect=True)


def tensors(shape, dtype, layout):
    """x, dy, residual, weight, bias, running_mean, running_var, num_batches_tracked, counts."""
    large = [laid_out(torch.randn(shape).to(dtype), layout) for _ in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [torch.randn(shape[1], dtype=wide) for _ in range(3)]
    counters = torch.tensor(3), torch.zeros(3, shape[1], dtype=torch.int64)
    return [*large, *vectors, torch.rand(shape[1], dtype=wide) + 0.5, *counters]


def run_all(x, dy, residual, weight, bias, mean, var, batches, counts):
    """Call every native operator; returns all results, and the tensors written in place."""
    before = x.clone()
    mask = torch.rand(x.shape[0], *x.shape[2:], generator=torch.Generator().manual_seed(0)) < 0.8
    affine, state = (weight, bias), (mean, var, batches)
    found = [OPERATORS.stats(x, None), OPERATORS.stats(x, mask)]
    for training in (True, False):
        how = training, training, MOMENTUM, EPS
        found.append(OPERATORS.measure_(x, *state, *how, counts))
        for activation in (NONE, RELU, SILU):
            y, saved = OPERATORS.forward_(x, residual, *affine, *state, *how, *activation, counts, mask, True)
            kept = unlike(x, y)
            y_and_residual = (kept, None) if activation == RELU else (None, residual)
            needs = True, activation != NONE, True, True
            left_out = mask if activation == NONE else None  # the residual's gradient is undefined there
            gradients = OPERATORS.backward(
                dy, x, unlike(x, saved), *affine, *y_and_residual, training, *activation, *needs, left_out, True
            )
            found += [y, saved, *(g for g in gradients if g is not None)]
            given = (*(unlike(x, row) for row in saved[::2]), *affine)
            found.append(OPERATORS.apply(x, *given, residual, *activation))
            found.append(OPERATORS.finish(x, saved, *affine, residual, *activation))
            found.append(OPERATORS.grad_stats(dy, x, *given, *y_and_residual, *activation))
            means = unlike(x, torch.ones(2, x.shape[1], dtype=torch.float64))
            found.append(OPERATORS.grad_input(dy, x, *given, *y_and_residual, means, *activation))
        found.append(OPERATORS.invert(x, saved, *affine, *NONE))
        overwritten = unlike(x, x)
        found.append(OPERATORS.inplace_(overwritten, *affine, *state, *how, *NONE, counts))
        found.append(overwritten.clone())
        found += OPERATORS.backward_(dy, overwritten, saved, *affine, training, *NONE, True, True)
        found.append(overwritten)
    y, saved = OPERATORS.forward_groups_(
        x, residual, *affine, *state, 2, x.shape[0] // 2, True, True, MOMENTUM, EPS, *NONE, counts
    )
    found += [y, saved]
    found += OPERATORS.backward_groups(
        dy, x, saved, *affine, None, None, 2, x.shape[0] // 2, *NONE, True, False, True, True
    )
    assert torch.equal(x, before)
    return [t for t in found if t is not None] + [mean, var, batches, counts]


def unlike(x, t):
    """A copy of t, as aligned to its elements as x is."""
    return t.clone() if x.data_ptr() % x.element_size() == 0 else unaligned(t)


@native
@dtypes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operator(kernel, shape, layout, dtype):
    given = tensors(shape, dtype, layout)
    # x alone, each of the others alone, all of them.
    wanted = run_all(*map(torch.clone, given))
    for chosen in ({0}, {1}, {2}, {3, 4}, {5, 6}, {7, 8}, set(range(9))):
        moved = [unaligned(t, 1) if i in chosen else t.clone() for i, t in enumerate(given)]
        for i, (value, right) in enumerate(zip(run_all(*moved), wanted, strict=True)):
            assert torch.equal(value, right), f"result {i} with {chosen}"


@native
@layouts
@pytest.mark.parametrize("inplace", [True, False])
def test_large_results_stored_past_the_cache(kernel, layout, inplace):
    x = laid_out(torch.randn(LARGE), layout)
    layer = kn.BatchNorm2d(LARGE[1])
    other = copy.deepcopy(layer)
    given = unaligned(x, 1)
    with torch.no_grad():
        y = layer(given, activation="leaky_relu", inplace=inplace)
        assert torch.equal(y, other(x, activation="leaky_relu"))
        assert (y is given) == inplace


@dtypes
@layouts
@pytest.mark.parametrize("inplace", [True, False])
def test_a_layer_in_training(kernel, layout, dtype, inplace):
    """Parameters and buffers too, as a file that was mapped into memory may give them."""
    x, dy, *_ = tensors((4, 7, 3, 5), dtype, layout)
    results = []
    for moved in (torch.clone, unaligned):
        torch.manual_seed(0)
        layer = kn.BatchNorm2d(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        torch.nn.init.normal_(layer.weight)
        state = {name: moved(t) for name, t in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        leaf = moved(x).requires_grad_()
        y = layer(moved(x).copy_(leaf), inplace=inplace)
        values = y.detach().clone()
        y.backward(moved(dy))
        results.append([values, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for found, right in zip(*results, strict=True):
        assert torch.equal(found, right)
