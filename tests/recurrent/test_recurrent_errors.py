"""What is refused, with which words, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from keelnorm.nn.recurrent.recurrent_cells import BatchNormGRUCell, BatchNormLSTMCell
from keelnorm.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM
from keelnorm.nn.recurrent.stepwise import StepwiseBatchNorm

X = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 0}, r"hidden_size is an integer from 1 on; got 0 \(int\)"),
        ({"num_layers": 1.5}, "num_layers is an integer"),
        ({"normalize": "none"}, "normalize is 'recurrent' or 'input'; got 'none'"),
        ({"max_length": 0}, "max_length is the number of steps"),
        ({"dropout": 2.0}, "dropout is a probability"),
        ({"initial_noise": -0.1}, "initial_noise is a standard deviation, 0 or more and finite"),
        ({"initial_noise": float("inf")}, "initial_noise is a standard deviation, 0 or more and finite"),
    ],
)
def test_constructor(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BatchNormLSTM(**({"input_size": 3, "hidden_size": 4} | options))


def test_dropout_without_a_second_layer_is_announced() -> None:
    with pytest.warns(UserWarning, match="dropout acts between layers"):
        BatchNormLSTM(3, 4, dropout=0.5)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        ((None,), {}, TypeError, "the input must be a tensor of 2 or 3 dimensions; got None"),
        ((X.long(),), {}, TypeError, "must have the dtype of the weights, float32; got an int64 tensor"),
        ((X.double(),), {}, TypeError, "float64 tensor of shape .4, 2, 3."),
        ((X[..., :2],), {}, ValueError, r"the last of size 3 \(input_size\); got a float32 tensor of shape .4, 2, 2."),
        ((X[None],), {}, ValueError, "2 or 3 dimensions"),
        ((X, X), {}, TypeError, r"the initial state is a tuple \(h, c\); got a float32 tensor"),
        ((X, (X, X, X)), {}, TypeError, r"a tuple \(h, c\); got 3 values"),
        ((X, (torch.zeros(1, 2, 4), X)), {}, ValueError, r"state c must be a float32 tensor of shape \(1, 2, 4\)"),
        ((X, (torch.zeros(1, 2, 4), None)), {}, TypeError, "state c must be .* got None"),
        ((X,), {"mask": torch.ones(2, 4).bool()}, ValueError, r"of shape \(4, 2\)"),
        ((X,), {"mask": torch.ones(4, 2)}, TypeError, "a mask is boolean, .* got a float32 tensor"),
        ((X,), {"lengths": [5, 1]}, ValueError, "lengths lie between 0 and 4, the steps of the input; got 1 to 5"),
        ((X,), {"lengths": [1, -1]}, ValueError, "got -1 to 1"),
        ((X,), {"lengths": [4]}, ValueError, "lengths are 2 integers"),
        ((X,), {"lengths": [1.0, 2.0]}, ValueError, "lengths are 2 integers"),
        ((X,), {"lengths": [1, 2], "mask": torch.ones(4, 2).bool()}, ValueError, "give one of them"),
        ((X[:, 0],), {"lengths": [4]}, ValueError, "are for a batch"),
        ((pack_sequence([X[:, 0], X[:2, 0]]),), {"lengths": [4, 2]}, ValueError, "a packed sequence knows its lengths"),
        ((X[:, :1],), {}, ValueError, "one sequence has no variance over the batch"),
        ((X[:, 0],), {}, ValueError, "Use a larger batch"),
        ((X,), {"lengths": [0, 4]}, ValueError, "got a batch of 1 at step 0"),
    ],
)
def test_call(arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], words: str) -> None:
    layer = BatchNormLSTM(3, 4, bidirectional=False)
    before = [buffer.clone() for buffer in layer.buffers()]
    with pytest.raises(error, match=words):
        layer(*arguments, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before, strict=True))


def test_a_single_sequence_is_evaluated_and_trains_by_its_input() -> None:
    assert BatchNormLSTM(3, 4).eval()(X[:, 0])[0].shape == (4, 4)
    assert BatchNormGRU(3, 4, normalize="input")(torch.randn(4, 3))[0].shape == (4, 4)


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"eps": -1.0}, "eps must be positive"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("nan")}, "eps must be positive"),
        ({"momentum": float("nan")}, "momentum must be finite"),
        ({"momentum": float("inf")}, "momentum must be finite"),
    ],
    ids=str,
)
def test_numbers_that_make_nan(option: dict[str, Any], words: str, normalize: str) -> None:
    layers = [
        BatchNormLSTM(3, 4, normalize=normalize, num_layers=2, **option),
        BatchNormGRU(3, 4, normalize=normalize, **option),
    ]
    calls = [lambda layer=layer: layer(torch.randn(4, 2, 3)) for layer in layers]
    if normalize == "recurrent":
        cells = [BatchNormLSTMCell(3, 4, **option), BatchNormGRUCell(3, 4, **option)]
        calls += [lambda cell=cell: cell(torch.randn(2, 3), step=1) for cell in cells]
        layers += cells
    for layer, call in zip(layers, calls, strict=True):
        before = [buffer.clone() for buffer in layer.buffers()]
        with pytest.raises(ValueError, match=words):
            call()
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before, strict=True))


def test_eps_may_be_0_where_the_running_statistics_normalize() -> None:
    y, _ = BatchNormLSTM(3, 4, eps=0.0).eval()(torch.randn(4, 2, 3))
    assert y.isfinite().all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "convert", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn, lambda x: torch.nested.nested_tensor([x[0], x[1]])]
)
def test_other_kinds_of_tensors(convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    layer = BatchNormLSTM(3, 4)
    with pytest.raises(TypeError, match="the input must be an ordinary dense tensor"):
        layer(convert(X))
    state = torch.zeros(1, 2, 4)
    with pytest.raises((TypeError, ValueError), match="the initial state c must be"):
        layer(X, (state, convert(torch.zeros(2, 2, 4))))


@pytest.mark.parametrize("step", [-1, 1.0, None, True])
def test_step(step: object) -> None:
    with pytest.raises(ValueError, match="an integer from 0 on"):
        BatchNormLSTMCell(3, 4)(X[0], step=step)
    with pytest.raises(ValueError, match="an integer from 0 on"):
        StepwiseBatchNorm(3)(X[0], step=step)


def test_stepwise_input() -> None:
    layer = StepwiseBatchNorm(3)
    with pytest.raises(ValueError, match="2 dimensions"):
        layer(X, step=0)
    with pytest.raises(ValueError, match="x has 2 channels"):
        layer(X[0, :, :2], step=0)
    with pytest.raises(ValueError, match="one sequence has no variance"):
        layer(X[0, :1], step=0)
    assert layer.num_batches_tracked.sum() == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_is_refused() -> None:
    layer = BatchNormGRU(3, 4)
    with pytest.raises(RuntimeError, match=r"does not go through torch\.jit\.script"):
        torch.jit.script(layer)
    with pytest.raises(RuntimeError, match=r"does not run under torch\.jit\.trace"):
        torch.jit.trace(layer.eval(), X)
