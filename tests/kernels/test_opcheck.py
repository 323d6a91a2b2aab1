"""torch.library.opcheck on every operator: schema, mutation, autograd, fake kernel, tracing."""

from __future__ import annotations

import pytest
import torch
from support.cases import DENSE, EPS, laid_out
from support.forcing import require_kernel
from support.operators import NONE, RELU, activation_of

OPERATORS = torch.ops.keelnorm
CHANNELS = 6
LEAKY_RELU, ELU, SOFTPLUS = (activation_of(name) for name in ("leaky_relu", "elu", "softplus"))
ACTIVATIONS = (NONE, RELU, LEAKY_RELU, ELU, SOFTPLUS)


@pytest.fixture(autouse=True)
def _native():
    require_kernel("baseline")


def values(layout, *, grad=False):
    return laid_out(torch.randn(3, CHANNELS, 4, 5), layout).requires_grad_(grad)


def vector(*, grad=False, dtype=torch.float32):
    return torch.rand(CHANNELS, dtype=dtype).add_(0.5).requires_grad_(grad)


def statistics():
    return vector(dtype=torch.float64), vector(dtype=torch.float64)


def samples_of_stats(layout):
    yield values(layout), None
    yield values(layout), torch.rand(3, 4, 5) < 0.5


def samples_of_apply(layout):
    for activation in ACTIVATIONS:
        yield values(layout), *statistics(), vector(), vector(), values(layout), *activation
        yield values(layout), *statistics(), None, None, None, *activation


def samples_of_grad_stats(layout):
    yield values(layout), values(layout), *statistics(), vector(), vector(), values(layout), None, *RELU
    yield values(layout), values(layout), *statistics(), vector(), vector(), None, None, *RELU
    yield values(layout), values(layout), *statistics(), vector(), vector(), None, values(layout), *SOFTPLUS
    yield values(layout), values(layout), *statistics(), None, None, None, None, *NONE


def samples_of_grad_input(layout):
    means = torch.randn(2, CHANNELS, dtype=torch.float64)
    yield values(layout), values(layout), *statistics(), vector(), vector(), values(layout), None, means, *RELU
    yield values(layout), values(layout), *statistics(), vector(), vector(), None, None, means, *RELU
    yield values(layout), values(layout), *statistics(), vector(), vector(), None, values(layout), means, *SOFTPLUS
    yield values(layout), values(layout), *statistics(), None, None, None, None, None, *NONE


def samples_of_forward(layout):
    for grad in (False, True):
        affine = vector(grad=grad), vector(grad=grad)
        yield values(layout, grad=grad), values(layout, grad=grad), *affine, vector(), vector(), True, EPS, *RELU
        yield values(layout, grad=grad), values(layout, grad=grad), *affine, vector(), vector(), True, EPS, *SOFTPLUS
        yield values(layout, grad=grad), None, *affine, vector(), vector(), False, EPS, *NONE
        yield values(layout, grad=grad), None, None, None, None, None, True, EPS, *RELU


def samples_of_forward_(layout):
    batches = torch.tensor(3)
    running = vector(), vector()
    yield values(layout), values(layout), vector(), vector(), *running, batches, True, True, 0.1, EPS, *RELU
    yield values(layout), None, None, None, *running, batches, True, True, None, EPS, *NONE
    yield values(layout), None, None, None, None, None, None, True, False, 0.0, EPS, *NONE
    yield values(layout), None, vector(), vector(), *running, None, False, False, 0.1, EPS, *RELU


def samples_of_measure_(layout):
    running = vector(), vector()
    counts = torch.zeros(3, CHANNELS, dtype=torch.int64)
    yield values(layout), *running, torch.tensor(3), True, True, 0.1, EPS, counts
    yield values(layout), *running, torch.tensor(3), True, True, None, EPS, None
    yield values(layout), None, None, None, True, False, 0.0, EPS, None
    yield values(layout), *running, None, False, False, 0.1, EPS, None


def samples_of_finish(layout):
    saved = torch.rand(3, CHANNELS, dtype=torch.float64)
    for activation in ACTIVATIONS:
        yield values(layout), saved, vector(), vector(), values(layout), *activation
        yield values(layout), saved, None, None, None, *activation


def samples_of_backward(layout):
    saved = torch.rand(3, CHANNELS, dtype=torch.float64)
    dy, x, y = values(layout), values(layout), values(layout)
    yield dy, x, saved, vector(), vector(), y, None, True, *RELU, True, True, True, True
    yield dy, x, saved, vector(), vector(), None, y, True, *SOFTPLUS, True, True, True, True
    yield dy, x, saved, vector(), vector(), None, None, True, *RELU, True, False, True, True
    yield dy, x, saved, None, None, None, None, False, *NONE, True, False, False, False
    yield dy, x, saved, vector(), vector(), None, None, True, *NONE, False, False, True, False
    yield dy, x, saved, None, None, None, None, True, *NONE, False, False, True, True


def samples_of_forward_groups_(layout):
    running = vector(), vector()
    counts = torch.zeros(3, CHANNELS, dtype=torch.int64)
    affine = vector(), vector()
    yield values(layout), values(layout), *affine, *running, torch.tensor(3), 2, 1, True, True, 0.1, EPS, *RELU, counts
    yield values(layout), None, None, None, *running, torch.tensor(3), 2, 1, False, True, None, EPS, *NONE, None
    yield values(layout), None, *affine, None, None, None, 2, 1, True, False, 0.0, EPS, *SOFTPLUS, None


def samples_of_backward_groups(layout):
    saved = torch.rand(6, CHANNELS, dtype=torch.float64)
    dy, x, y = values(layout), values(layout), values(layout)
    yield dy, x, saved, vector(), vector(), y, None, 2, 1, *RELU, True, True, True, True
    yield dy, x, saved, vector(), vector(), None, y, 2, 1, *SOFTPLUS, True, True, False, True
    yield dy, x, saved, None, None, None, None, 2, 1, *NONE, True, False, False, False
    yield dy, x, saved, vector(), vector(), None, None, 2, 1, *RELU, False, False, True, True


def samples_of_inplace_(layout):
    running = vector(), vector()
    yield values(layout), vector(), vector(), *running, torch.tensor(3), True, True, 0.1, EPS, *LEAKY_RELU
    yield values(layout), vector(), vector(), *running, None, False, False, 0.1, EPS, *NONE
    yield values(layout), None, None, None, None, None, True, False, 0.0, EPS, *ELU


def samples_of_invert(layout):
    saved = torch.rand(3, CHANNELS, dtype=torch.float64)
    for activation in (NONE, LEAKY_RELU, ELU):
        yield values(layout).abs(), saved, vector(), vector(), *activation  # elu has no values below −1
        yield values(layout).abs(), saved, None, None, *activation


def samples_of_backward_(layout):
    saved = torch.rand(3, CHANNELS, dtype=torch.float64)
    yield values(layout), values(layout), saved, vector(), vector(), True, *LEAKY_RELU, True, True
    yield values(layout), values(layout), saved, None, None, False, *NONE, False, False


#: Those that work in the memory of x, which has to be dense.
IN_PLACE = ("inplace_", "backward_")
SAMPLES = {
    "inplace_": samples_of_inplace_,
    "invert": samples_of_invert,
    "backward_": samples_of_backward_,
    "stats": samples_of_stats,
    "apply": samples_of_apply,
    "measure_": samples_of_measure_,
    "finish": samples_of_finish,
    "grad_stats": samples_of_grad_stats,
    "grad_input": samples_of_grad_input,
    "forward": samples_of_forward,
    "forward_": samples_of_forward_,
    "backward": samples_of_backward,
    "forward_groups_": samples_of_forward_groups_,
    "backward_groups": samples_of_backward_groups,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    for sample in SAMPLES[name]("contiguous"):
        torch.library.opcheck(getattr(OPERATORS, name).default, sample)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("name", SAMPLES)
def test_results_lie_in_memory_as_traced(name, layout):
    if name in IN_PLACE and layout not in DENSE:
        pytest.skip(f"{name} takes dense tensors only")
    for sample in SAMPLES[name](layout):
        torch.library.opcheck(getattr(OPERATORS, name).default, sample, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "shape", [(1, 6, 4, 5), (3, 1, 4, 5), (3, 6, 1, 1), (3, 6, 1, 5), (1, 6, 1, 1), (3, 6), (1, 6)]
)
def test_dimensions_of_size_one_lie_in_memory_as_traced(shape):
    """Their strides mean nothing, and come in several forms."""
    dense = torch.randn(shape)
    forms = [laid_out(dense, "contiguous"), laid_out(dense, "channels_last"), torch.randn(*shape, 2)[..., 0]]
    if 1 in shape:
        forms.append(dense.as_strided(shape, [77 if n == 1 else s for n, s in zip(shape, dense.stride(), strict=True)]))
    for x in forms:
        given = (x, None, None, None, torch.zeros(shape[1]), torch.ones(shape[1]), False, EPS, *NONE)
        torch.library.opcheck(OPERATORS.forward.default, given, test_utils=("test_schema", "test_faketensor"))
