"""Tensors without values: the meta device, fake tensors, and graphs that make_fx records."""

import pytest
import torch
from interop.interop_models import SHAPE, Block
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import keelnorm as kn

LAYERS = [
    (kn.BatchNorm, (4, 3, 2, 2, 2, 2)),
    (kn.BatchNorm1d, (4, 3)),
    (kn.BatchNorm2d, (4, 3, 5, 6)),
    (kn.BatchNorm3d, (2, 3, 4, 5, 6)),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer_type", "shape"), LAYERS)
def test_meta(layer_type, shape, dtype, training):
    layer = layer_type(3, device="meta", dtype=dtype).train(training)
    x, residual = (torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for _ in range(2))
    y = layer(x, residual, activation="relu")
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, shape)
    y.sum().backward()
    assert x.grad.shape == residual.grad.shape == shape
    assert layer.weight.grad.shape == layer.bias.grad.shape == (3,)
    assert {x.grad.device.type, layer.weight.grad.device.type} == {"meta"}


def test_meta_keeps_the_layout():
    x = torch.empty(SHAPE, device="meta").to(memory_format=torch.channels_last)
    assert kn.BatchNorm2d(3, device="meta")(x).is_contiguous(memory_format=torch.channels_last)


def test_a_model_made_on_meta_gets_its_state_later():
    source = Block()
    with torch.device("meta"):
        block = Block()
    block.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(SHAPE)
    assert torch.equal(block.eval()(x), source.eval()(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_fake_tensors(training, activation):
    with FakeTensorMode():
        layer = kn.BatchNorm2d(3).train(training)
        x = torch.empty(SHAPE, requires_grad=True)
        y = layer(x, x, activation=activation)
        assert (y.shape, y.dtype, y.device.type) == (SHAPE, torch.float32, "cpu")
        y.sum().backward()
        assert x.grad.shape == SHAPE
        assert layer.weight.grad.shape == (3,)
        with pytest.raises(ValueError, match="x has 4 channels"):
            layer(torch.empty(2, 4, 3, 3))


X = torch.arange(360.0).view(4, 3, 5, 6).cos()
LAYOUTS = {
    "contiguous": X,
    "channels last": X.contiguous(memory_format=torch.channels_last),
    "transposed": X.mT,
    "sliced": X[:, :, 1:, ::2],
    "expanded": X[:1].expand(4, -1, -1, -1),
    "one position": X[:, :, :1, :1],
    "one sample": X[:1].contiguous(memory_format=torch.channels_last),
    "rank 2": X[..., 0, 0],
    "rank 3, channels last": X[..., 0].mT.contiguous().mT,
}


@pytest.mark.skipif(kn.kernels.active() == "reference", reason="there are no native operators to compare with")
@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_fake_operators_return_what_the_real_ones_return(x):
    """Shapes, dtypes and strides, so that what is traced runs."""
    weight, bias = torch.ones(x.shape[1]), torch.zeros(x.shape[1])

    def run(x, weight, bias):
        y, saved = torch.ops.keelnorm.forward(x, x, weight, bias, None, None, True, 1e-5, 1, 0.0, 0.0)
        gradients = torch.ops.keelnorm.backward(
            x, x, saved, weight, bias, y, None, True, 1, 0.0, 0.0, True, True, True, True
        )
        return [y, saved, *gradients]

    real = run(x, weight, bias)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(tensor) for tensor in (x, weight, bias)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        # the stride of a dimension of size 1 says nothing
        assert [s for n, s in zip(a.shape, a.stride(), strict=True) if n > 1] == [
            s for n, s in zip(b.shape, b.stride(), strict=True) if n > 1
        ]


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_make_fx(training, tracing_mode):
    """The recorded graph computes what was recorded; in training each run updates the running statistics."""
    layer, twin = kn.BatchNorm2d(3).train(training), kn.BatchNorm2d(3).train(training)
    x = torch.randn(SHAPE)
    graph = make_fx(lambda x: layer(x, x, activation="relu"), tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    layer.load_state_dict(twin.state_dict())
    other = torch.randn(SHAPE)
    torch.testing.assert_close(graph(other), twin(other, other, activation="relu"), rtol=0, atol=4e-6)
    for name, value in layer.named_buffers():
        torch.testing.assert_close(value, twin.get_buffer(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx_of_a_gradient(tracing_mode):
    layer = kn.BatchNorm2d(3, track_running_stats=False)

    def gradient(x):
        return torch.autograd.grad(layer(x, activation="relu").square().sum(), x)[0]

    graph = make_fx(gradient, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(
        torch.randn(SHAPE, requires_grad=True)
    )
    x = torch.randn(SHAPE, requires_grad=True)
    torch.testing.assert_close(graph(x), gradient(x), rtol=0, atol=1e-5)
