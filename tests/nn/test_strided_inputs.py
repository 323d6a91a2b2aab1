"""Inputs that are neither contiguous nor channels-last: right results, and one copy in the layout of torch's."""

import pytest
import torch
import torch.nn.functional as F
from nn.layer_pairs import assert_near
from support.noted import noted
from torch.utils._python_dispatch import TorchDispatchMode

import keelnorm as kn
from keelnorm.engine.layout import dense, is_channels_last, is_dense

C = 6
BASE = torch.randn(4, C, 5, 7, generator=torch.Generator().manual_seed(0))
LAST = BASE.contiguous(memory_format=torch.channels_last)

#: name: (how a leaf becomes x, the leaf, whether torch's result is channels-last)
STRIDED = {
    "slice of samples": (lambda t: t[::2], BASE, False),
    "slice of channels": (lambda t: t[:, 1:5], BASE, False),
    "every other channel": (lambda t: t[:, ::2], BASE, False),
    "slice of rows": (lambda t: t[:, :, 1:4], BASE, False),
    "every other row": (lambda t: t[:, :, ::2], BASE, False),
    "slice of columns": (lambda t: t[..., 2:], BASE, False),
    "every other column": (lambda t: t[..., ::2], BASE, False),
    "slice of samples, channels last": (lambda t: t[::2], LAST, True),
    "slice of channels, channels last": (lambda t: t[:, 1:5], LAST, True),
    "slice of rows, channels last": (lambda t: t[:, :, 1:4], LAST, True),
    "slice of columns, channels last": (lambda t: t[..., 2:], LAST, True),
    "planes transposed": (lambda t: t.mT, BASE, False),
    "planes transposed, channels last": (lambda t: t.mT, LAST, False),
    "samples and rows transposed": (lambda t: t.transpose(0, 2), BASE, False),
    "all transposed": (lambda t: t.permute(3, 1, 2, 0), BASE, False),
    "samples expanded": (lambda t: t[:1].expand(4, -1, -1, -1), BASE, False),
    "positions expanded": (lambda t: t[..., :1].expand(-1, -1, -1, 7), BASE, False),
    "channels expanded": (lambda t: t[:, :1].expand(-1, C, -1, -1), BASE, False),
    "flipped rank 2": (lambda t: t[..., 0, 0].T, BASE, False),
    "slice of rank 2": (lambda t: t[..., 0, 0][:, 1:], BASE, False),
    "slice of rank 3": (lambda t: t[..., 0], BASE, False),
    "slice of rank 3, channels last": (lambda t: t[..., 0][:, 1:], LAST, False),
    "rank 5": (lambda t: t.unsqueeze(-1).expand(-1, -1, -1, -1, 2), BASE, False),
}
strided = pytest.mark.parametrize(("view", "leaf", "last"), STRIDED.values(), ids=STRIDED)


class Copies(TorchDispatchMode):
    """Counts the operators that copy a whole tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("clone", "contiguous", "_to_copy", "copy_") and args[0].dim() > 1
        return function(*args, **(kwargs or {}))


@strided
def test_the_layout_of_the_copy(view, leaf, last):
    x = view(leaf)
    assert not is_dense(x)
    copy = dense(x)
    assert torch.equal(copy, x)
    assert is_channels_last(copy) is last or copy.dim() == 2
    assert copy.is_contiguous() is not last
    assert dense(copy) is copy


@strided
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu", True), ("silu", True)])
def test_agrees_with_torch_in_float64(view, leaf, last, training, activation, with_residual, backend):
    source, source64 = leaf.clone().requires_grad_(), leaf.double().requires_grad_()
    x, x64 = view(source), view(source64)
    channels = x.shape[1]
    weight, bias, mean, var = torch.randn(channels), torch.randn(channels), torch.randn(channels), torch.ones(channels)
    residual, dy = (torch.randn(x.shape) for _ in range(2))
    y = kn.functional.batch_norm(
        x, mean.clone(), var.clone(), weight, bias, training, activation=activation,
        residual=residual if with_residual else None,
    )  # fmt: skip
    y64 = F.batch_norm(x64, mean.double(), var.double(), weight.double(), bias.double(), training)
    y64 = y64 + residual if with_residual else y64
    y64 = {None: lambda v: v, "relu": torch.relu, "silu": F.silu}[activation](y64)
    assert_near(y, y64)
    assert is_channels_last(y) is last or y.dim() == 2
    dy = torch.where(y64.detach().abs() < 1e-5, 0, dy)
    y.backward(dy), y64.backward(dy.double())
    assert_near(source.grad, source64.grad, units=64)


@strided
def test_one_copy(view, leaf, last):
    """The backward has it from the forward, in which it is saved in place of x."""
    x = view(leaf.clone().requires_grad_())
    saved: list[torch.Tensor] = []
    counter = Copies()
    with (
        kn.kernels.use("auto"),
        counter,
        torch.autograd.graph.saved_tensors_hooks(lambda t: noted(saved, t), lambda t: t),
    ):
        y = kn.functional.batch_norm(x, None, None, training=True)
    large = [t for t in saved if t.shape == x.shape and t.dtype == x.dtype]
    assert len(large) == 1
    assert is_dense(large[0])
    assert large[0].data_ptr() != x.data_ptr()
    assert y.stride() == large[0].stride()
    # one copy makes x dense; the reference back end converts dtypes, which float32 does not need
    assert counter.count == 1 or kn.kernels.active() == "reference"


def test_a_dense_input_is_not_copied(backend):
    for x in (BASE, LAST, BASE[1:3], LAST[1:3], LAST[..., :1].contiguous(memory_format=torch.channels_last)):
        assert dense(x) is x


def test_the_gradient_of_an_expanded_input(backend):
    """Adds up over what was expanded, and the moments are those of the expanded values."""
    leaf = torch.randn(5, C, 1, requires_grad=True)
    y = kn.functional.batch_norm(leaf.expand(-1, -1, 3), None, None, training=True, activation="gelu")
    y.square().sum().backward()
    leaf64 = leaf.detach().double().requires_grad_()
    F.gelu(F.batch_norm(leaf64.expand(-1, -1, 3), None, None, training=True)).square().sum().backward()
    assert_near(leaf.grad, leaf64.grad, units=64)
