"""What a layer refuses: the error says what was asked, what came, what is legal and what to do; nothing changes."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_untouched, randomize, snapshot
from torch import nn

import keelnorm as kn

GOOD = torch.randn(4, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0))
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


class Bad(NamedTuple):
    """A call of a BatchNorm2d that is refused, and the words without which the message would not help."""

    arguments: tuple[Any, ...]
    error: type[Exception]
    words: tuple[str, ...]
    keywords: dict[str, Any] = {}  # noqa: RUF012 - never changed


def bad_residual(residual, error, *words):
    return Bad((GOOD, residual), error, ("residual", *words))


def bad_activation(activation, came):
    return Bad((GOOD,), ValueError, ("activation", "None, 'relu'", "got", came), {"activation": activation})


CALLS = {
    "x None": Bad((None,), TypeError, ("x must be a tensor", "(N, C, *S)", "got None")),
    "x list": Bad(([[1.0, 2.0]],), TypeError, ("x must be a tensor", "(N, C, *S)", "got [[1.0, 2.0]] (list)")),
    "x array": Bad((GOOD.numpy(),), TypeError, ("x must be a tensor", "(N, C, *S)", "ndarray")),
    "x int64": Bad(
        (GOOD.long(),), TypeError, ("real floating-point", "an int64 tensor of shape (4, 5, 3, 3) on cpu", "x.float()")
    ),
    "x bool": Bad((GOOD > 0,), TypeError, ("real floating-point", "a bool tensor", "x.float()")),
    "x complex": Bad((GOOD + 0j,), TypeError, ("real floating-point", "a complex64 tensor")),
    "x channels": Bad((GOOD[:, :4],), ValueError, ("x has 4 channels", "(4, 4, 3, 3)", "and the layer 5;")),
    "x channels last": Bad(
        (GOOD.movedim(1, -1),),
        ValueError,
        ("x has 3 channels", "and the layer 5;", "if x is (N, *S, C), give x.movedim(-1, 1)"),
    ),
    "x meta": Bad((GOOD.to("meta"),), ValueError, ("x is on meta", "must be there too", "shape (5,) on cpu")),
    "residual None-like": bad_residual(0.0, TypeError, "real floating-point tensor", "got 0.0 (float)"),
    "residual list": bad_residual([1], TypeError, "real floating-point tensor", "got [1] (list)"),
    "residual array": bad_residual(np.float32(1), TypeError, "real floating-point tensor", "(float32)"),
    "residual bool": bad_residual(
        GOOD > 0, TypeError, "real floating-point tensor", "a bool tensor of shape (4, 5, 3, 3)"
    ),
    "residual int": bad_residual(GOOD.int(), TypeError, "real floating-point tensor", "an int32 tensor"),
    "residual complex": bad_residual(GOOD + 0j, TypeError, "real floating-point tensor", "a complex64 tensor"),
    "residual broadcasts": bad_residual(GOOD[:1], ValueError, "x's shape (4, 5, 3, 3)", "shape (1, 5, 3, 3) on cpu"),
    "residual rank": bad_residual(GOOD[0], ValueError, "x's shape (4, 5, 3, 3)", "shape (5, 3, 3) on cpu"),
    "residual scalar": bad_residual(torch.tensor(1.0), ValueError, "x's shape (4, 5, 3, 3)", "shape () on cpu"),
    "residual meta": bad_residual(GOOD.to("meta"), ValueError, "x is on cpu", "shape (4, 5, 3, 3) on meta"),
    "activation name": bad_activation("prelu", "'prelu' (str)"),
    "activation case": bad_activation("ReLU", "'ReLU' (str)"),
    "activation module": bad_activation(nn.Softmax(), "Softmax(dim=None) (Softmax)"),
    "activation class": bad_activation(nn.ReLU, "(type)"),
    "activation function": bad_activation(torch.relu, "(builtin_function_or_method)"),
    "activation list": bad_activation(["relu"], "['relu'] (list)"),
    "activation code": bad_activation(1, "1 (int)"),
    "activation bool": bad_activation(True, "True (bool)"),
    "activation bytes": bad_activation(b"relu", "b'relu' (bytes)"),
    "activation tensor": bad_activation(torch.ones(2), "a float32 tensor of shape (2,)"),
}


def assert_refused(layer, call, error, words):
    before = snapshot(layer)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert_untouched(layer, before)


@trainings
@pytest.mark.parametrize("bad", CALLS.values(), ids=CALLS)
def test_bad_calls(bad, training, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    assert_refused(layer, lambda: layer(*bad.arguments, **bad.keywords), bad.error, bad.words)


LEGAL_RANKS = {
    kn.BatchNorm: ((2, 3, 4, 5, 6), "two or more dimensions"),
    kn.BatchNorm1d: ((2, 3), "2 or 3 dimensions"),
    kn.BatchNorm2d: ((4,), "4 dimensions"),
    kn.BatchNorm3d: ((5,), "5 dimensions"),
}
WRONG_RANKS = [(layer, rank) for layer, (legal, _) in LEGAL_RANKS.items() for rank in range(7) if rank not in legal]


@trainings
@pytest.mark.parametrize(("layer_type", "rank"), WRONG_RANKS, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_ranks(layer_type, rank, training, backend):
    """torch refuses the same; kn.BatchNorm takes all ranks from two on."""
    shape = (4, CHANNELS, 2, 2, 2, 2)[:rank]
    layer = randomize(layer_type(CHANNELS)).train(training)
    words = (layer_type.__name__, LEGAL_RANKS[layer_type][1], "channels second", f"shape {shape} on cpu")
    assert_refused(layer, lambda: layer(torch.randn(shape)), ValueError, words)


SINGLE = [
    (kn.BatchNorm, (1, CHANNELS)),
    (kn.BatchNorm1d, (1, CHANNELS)),
    (kn.BatchNorm1d, (1, CHANNELS, 1)),
    (kn.BatchNorm2d, (1, CHANNELS, 1, 1)),
    (kn.BatchNorm3d, (1, CHANNELS, 1, 1, 1)),
]


@pytest.mark.parametrize(("layer_type", "shape"), SINGLE)
@pytest.mark.parametrize("keywords", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_one_value_per_channel_in_training(layer_type, shape, keywords, backend):
    layer = randomize(layer_type(CHANNELS, **keywords))
    remedy = "model.eval()" if layer.track_running_stats else "track_running_stats=True"
    words = (layer_type.__name__, "one value per channel has no variance", f"shape {shape} on cpu",
             "larger batch", "drop_last=True", remedy)  # fmt: skip
    assert_refused(layer, lambda: layer(torch.randn(shape)), ValueError, words)


def test_one_value_per_channel_without_moments_to_evaluate_with():
    layer = kn.BatchNorm2d(CHANNELS, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="track_running_stats") as caught:
        layer(torch.randn(1, CHANNELS, 1, 1))
    assert "model.eval()" not in str(caught.value)


#: Tensors of a layer that stay behind on another device; those that no check looks at give memory that nobody wrote.
UNCHECKED = {"auto": ("bias", "running_var", "num_batches_tracked"), "reference": ("num_batches_tracked",)}


LEFT_BEHIND = [(name, mode) for name in ("weight", "bias", "running_mean", "running_var") for mode in (True, False)]


@pytest.mark.parametrize(("left_behind", "training"), [*LEFT_BEHIND, ("num_batches_tracked", True)])
def test_one_tensor_on_another_device(left_behind, training, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    tensor = getattr(layer, left_behind)
    setattr(layer, left_behind, nn.Parameter(tensor.to("meta")) if tensor.requires_grad else tensor.to("meta"))
    assert_refused(layer, lambda: layer(GOOD), ValueError, ("x is on cpu", left_behind, "on meta"))


@pytest.mark.parametrize("layer_type", LEGAL_RANKS)
def test_the_message_names_the_layer(layer_type, backend):
    """Also where the native operators are the first to notice."""
    layer = layer_type(3)
    x = torch.randn(4, 2, *[3] * (max(LEGAL_RANKS[layer_type][0][:2]) - 2))
    assert_refused(layer, lambda: layer(x), ValueError, (f"{layer_type.__name__}: x has 2 channels",))


#: How a tensor (4, 5) becomes one of another kind, what the error calls it, and the remedy in it.
KINDS = {
    "sparse": (torch.Tensor.to_sparse, "float32 sparse_coo tensor of shape (4, 5)", ".to_dense()"),
    "csr": (torch.Tensor.to_sparse_csr, "float32 sparse_csr tensor of shape (4, 5)", ".to_dense()"),
    "mkldnn": (torch.Tensor.to_mkldnn, "float32 mkldnn tensor of shape (4, 5)", ".to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:2]]), "float32 nested tensor of 2 parts", "mask="),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
        "float32 nested tensor of 2 parts",
        "mask=",
    ),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "a qint8 tensor", ".dequantize()"),
    "complex": (lambda x: x + 0j, "a complex64 tensor", "x.real"),
    "integer": (torch.Tensor.int, "an int32 tensor", "x.float()"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@trainings
@pytest.mark.parametrize(("convert", "came", "remedy"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layer_type", [kn.BatchNorm, kn.BatchNorm1d, kn.L1BatchNorm, kn.SyncBatchNorm])
def test_other_kinds_of_tensors(layer_type, convert, came, remedy, training, backend):
    layer, x = randomize(layer_type(CHANNELS)).train(training), convert(torch.randn(4, CHANNELS))
    assert_refused(
        layer, lambda: layer(x), TypeError, (layer_type.__name__, f"got {came}" if came[0] != "f" else came, remedy)
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@trainings
@pytest.mark.parametrize(("convert", "came", "remedy"), KINDS.values(), ids=KINDS)
def test_other_kinds_of_tensors_in_a_converted_model(convert, came, remedy, training, backend):
    """Where the result would wait for the activation."""
    model, _ = kn.convert(nn.Sequential(randomize(kn.BatchNorm1d(CHANNELS)), nn.ReLU()).train(training))
    for _ in range(2):
        model(torch.randn(4, CHANNELS))
    x = convert(torch.randn(4, CHANNELS))
    assert_refused(model[0], lambda: model(x), TypeError, ("BatchNorm1d '0'", came, remedy))
    words = ("BatchNorm1d '0': x has 4 channels", "and the layer 5;")
    assert_refused(model[0], lambda: model(torch.randn(4, 4)), ValueError, words)
    assert model(torch.randn(4, CHANNELS)).min() == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@trainings
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual"])
@pytest.mark.parametrize("kind", ["sparse", "mkldnn"])
def test_other_kinds_beside_x(name, kind, training, backend):
    moments = {"running_mean": torch.zeros(CHANNELS), "running_var": torch.ones(CHANNELS)}
    shape = (4, CHANNELS) if name == "residual" else (CHANNELS,)
    keywords = moments | {name: KINDS[kind][0](torch.rand(shape))}
    with pytest.raises(TypeError, match=rf"{name} must be .*{kind}.*to_dense"):
        kn.functional.batch_norm(torch.randn(4, CHANNELS), **keywords, training=training)
    assert torch.equal(moments["running_mean"], torch.zeros(CHANNELS))
    layer = randomize(kn.BatchNorm1d(CHANNELS)).train(training)
    if name != "residual":  # in place of the layer's own
        value = KINDS[kind][0](torch.rand(CHANNELS))
        setattr(layer, name, nn.Parameter(value) if name in ("weight", "bias") else value)
    with pytest.raises(TypeError, match=rf"{name} must be .*{kind}.*to_dense"):
        layer(torch.randn(4, CHANNELS), **({"residual": keywords["residual"]} if name == "residual" else {}))


def test_a_refused_call_leaves_no_trace(backend):
    """The next call is what it would have been."""
    layer, other = randomize(kn.BatchNorm2d(CHANNELS)), kn.BatchNorm2d(CHANNELS)
    other.load_state_dict(layer.state_dict())
    for bad in CALLS.values():
        with pytest.raises(bad.error):
            layer(*bad.arguments, **bad.keywords)
    assert torch.equal(layer(GOOD), other(GOOD))
    assert_untouched(layer, other.state_dict())
