"""The node in C++ gives what the node in Python gives, bit for bit, and leaves to Python what it can't do rightly."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.activations import MODULES
from support.node_calls import Seen, counted, everything, in_python, layer_for, same
from torch import Tensor, nn
from torch.autograd import forward_ad

from keelnorm.engine.activations import NAMED
from keelnorm.engine.kernels.cpu import autograd_node

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS: tuple[Any, ...] = (*NAMED, *MODULES)
SHAPES = {"2d": (9, 5), "3d": (4, 3, 7), "4d": (4, 3, 5, 2), "5d": (2, 3, 2, 3, 2)}

pytestmark = pytest.mark.skipif(autograd_node.run is None, reason=f"no node in C++: {autograd_node.missing()}")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_every_activation(monkeypatch: pytest.MonkeyPatch, activation: Any, residual: bool) -> None:
    for dtype in DTYPES:
        layer = layer_for((4, 3, 5), dtype)
        x = torch.randn(4, 3, 5).to(dtype).requires_grad_()
        added = torch.randn(4, 3, 5).to(dtype).requires_grad_() if residual else None
        with counted(monkeypatch) as taken:
            ours = everything(layer, x, added, activation)
        assert taken == [True]
        with in_python(monkeypatch):
            same(ours, everything(layer, x, added, activation))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.5}],
    ids=str,
)
def test_every_form_of_layer(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    for training in (True, False):
        for wanted in (True, False):
            layer = layer_for(shape, **options).train(training)
            x = torch.randn(shape, requires_grad=wanted)
            with counted(monkeypatch) as taken:
                ours = everything(layer, x, None, "silu")
            assert taken == [True]
            with in_python(monkeypatch):
                same(ours, everything(layer, x, None, "silu"))


@pytest.mark.parametrize("wanted", range(16))
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_every_choice_of_gradients(monkeypatch: pytest.MonkeyPatch, wanted: int, activation: Any) -> None:
    layer = layer_for((4, 3, 5))
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    for bit, tensor in enumerate((x, residual, layer.weight, layer.bias)):
        tensor.requires_grad_(bool(wanted >> bit & 1))
    with counted(monkeypatch) as taken:
        ours = everything(layer, x, residual, activation)
    assert taken == [True]
    with in_python(monkeypatch):
        same(ours, everything(layer, x, residual, activation))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_layouts(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    layer = layer_for((4, 3, 5, 2))
    x = torch.randn(4, 3, 5, 2)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    else:
        x = torch.randn(4, 3, 5, 4)[..., ::2]
    x.requires_grad_()
    ours = everything(layer, x, None, "relu")
    with in_python(monkeypatch):
        same(ours, everything(layer, x, None, "relu"))


@pytest.mark.parametrize("activation", [None, "relu", "silu", "tanh"])
def test_second_derivatives(activation: str | None) -> None:
    layer = layer_for((5, 3), torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer.weight.data, layer.bias.data = weight.data, bias.data
        own = {"weight": weight, "bias": bias}
        layer._parameters.update(own)  # the node looks there, and takes plain tensors
        return layer(x, residual, activation=activation)

    inputs = (x, residual, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_what_python_has_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in modes and transforms, and of other kinds of tensors, are left to Python, and are right there."""
    layer = layer_for((4, 3))
    x = torch.randn(4, 3)
    with counted(monkeypatch) as taken:
        torch.func.vmap(lambda x: layer.eval()(x))(torch.randn(2, 4, 3))
        torch.func.grad(lambda x: layer(x).sum())(x)
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(x, x))
        layer(x.T.contiguous().T)
        layer(nn.Parameter(x).mT.mT)
        with pytest.raises(ValueError, match="has 5 channels"):
            layer(torch.randn(4, 5))
        with pytest.raises(TypeError, match="must be a tensor"):
            layer([1.0])
        with pytest.raises(TypeError, match="floating-point"):
            layer(x.int())
        with Seen() as seen:
            layer(x)
        with torch.device("cpu"):
            layer(x)
    assert taken.count(True) == 1  # the view of a parameter
    assert any(name.endswith("batch_norm") for name in seen.names)


def test_a_mode_that_is_true_but_not_a_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_for((4, 3)), torch.randn(4, 3)
    plain = everything(layer, x, None, None)
    layer.training = 1  # type: ignore[assignment]
    with counted(monkeypatch) as taken:
        same(everything(layer, x, None, None), plain)
    assert taken == [True]


def test_errors_leave_the_layer_as_it_was() -> None:
    layer = layer_for((4, 3))
    before = copy.deepcopy(layer.state_dict())
    for wrong in (torch.randn(4, 4), torch.randn(1, 3), torch.randn(4, 3).half().to_sparse(), torch.ones(4, 3).int()):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            layer(wrong)
    with pytest.raises(ValueError, match="residual"):
        layer(torch.randn(4, 3), torch.randn(4, 1))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_autograd_is_told_what_was_written() -> None:
    layer = layer_for((4, 3))
    buffers = [*layer.buffers(), layer.update_counts()]
    before = [buffer._version for buffer in buffers]
    layer(torch.randn(4, 3, requires_grad=True))
    assert [buffer._version for buffer in buffers] == [version + 1 for version in before]
    layer.eval()(torch.randn(4, 3))
    assert [buffer._version for buffer in buffers] == [version + 1 for version in before]


def test_its_name() -> None:
    assert layer_for((4, 3))(torch.randn(4, 3)).grad_fn.name() == "torch::autograd::CppNode<keelnorm::BatchNorm>"


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use
def test_compiled_autograd() -> None:
    from torch._dynamo import compiled_autograd

    layer, x = layer_for((4, 3)), torch.randn(4, 3, requires_grad=True)
    plain = everything(layer, x, None, "silu")[1]
    with compiled_autograd._enable(torch.compile(backend="eager")):
        layer(x, activation="silu").backward(torch.randn((4, 3), generator=torch.Generator().manual_seed(5)))
    assert torch.equal(x.grad, plain)


def test_a_changed_weight_is_torchs_error() -> None:
    layer = layer_for((4, 3))
    y = layer(torch.randn(4, 3, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_needs_a_retained_graph() -> None:
    layer = layer_for((4, 3))
    y = layer(torch.randn(4, 3, requires_grad=True), activation="relu")
    y.sum().backward(retain_graph=True)
    first = layer.weight.grad.clone()
    y.sum().backward()
    assert torch.equal(layer.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_batched_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_for((4, 3), torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x, activation="silu")
    many = torch.randn(5, 4, 3, dtype=torch.float64)
    [batched] = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in many])
    torch.testing.assert_close(batched, one_by_one)


def test_modes_of_torch() -> None:
    layer = layer_for((4, 3)).eval()
    x = torch.randn(4, 3)
    plain = layer(x, activation="relu").detach()
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu")):
        with mode:
            y = layer(x, activation="relu")
            assert torch.equal(y, plain)
            assert y.is_inference() == isinstance(mode, torch.inference_mode)
    made = layer(x.requires_grad_()).sum()
    with torch.inference_mode():
        inside = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer(inside)
    made.backward()


def test_threads() -> None:
    layer = layer_for((64, 3)).eval()
    x = torch.randn(64, 3)
    expected = everything(layer, x.clone().requires_grad_(), None, "gelu")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                same(everything(layer, x.clone().requires_grad_(), None, "gelu"), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_for_another_torch_is_not_loaded() -> None:
    assert autograd_node.file_name("9.9.9") != autograd_node.file_name(torch.__version__)
    assert Path(autograd_node.__file__).with_name(autograd_node.file_name(torch.__version__)).exists()


def test_it_can_be_left_out() -> None:
    program = (
        "import torch, keelnorm as kn; from keelnorm.engine.kernels.cpu import autograd_node as node\n"
        "kn.BatchNorm1d(3)(torch.randn(4, 3, requires_grad=True)).sum().backward()\n"
        "print(node.run, node.missing())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"KEELNORM_NODE": "0", "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None KEELNORM_NODE=0 leaves it out", done.stderr
