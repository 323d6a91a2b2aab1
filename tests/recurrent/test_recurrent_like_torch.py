"""Where the normalization is the identity, a layer is torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_oracle import flat, gradients
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from keelnorm.nn.recurrent.recurrent_cells import BatchNormGRUCell, BatchNormLSTMCell
from keelnorm.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM

PAIRS = {"LSTM": (torch.nn.LSTM, BatchNormLSTM), "GRU": (torch.nn.GRU, BatchNormGRU)}
CELLS = {"LSTM": (torch.nn.LSTMCell, BatchNormLSTMCell), "GRU": (torch.nn.GRUCell, BatchNormGRUCell)}


def identity(layer: torch.nn.Module) -> torch.nn.Module:
    """In evaluation, with mean 0, variance 1 − eps, γ = 1 and β = 0."""
    for name, buffer in layer.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1 - 1e-5)
    for name, parameter in layer.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    return layer.eval()


def pair(
    kind: str, normalize: str, dtype: torch.dtype = torch.float32, **options
) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs, ours = PAIRS[kind]
    torch_layer = theirs(3, 5, dtype=dtype, **options).eval()
    layer = identity(ours(3, 5, normalize=normalize, dtype=dtype, **options))
    missing, unexpected = layer.load_state_dict(torch_layer.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(name.startswith("norm_") for name in missing)
    return torch_layer, layer


def assert_same(theirs: object, ours: object, torch_layer, layer, wanted: list[torch.Tensor], tolerance: float) -> None:
    a, b = flat(theirs), flat(ours)
    torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    names = [name for name, _ in torch_layer.named_parameters()]
    first = gradients(a, [*wanted, *torch_layer.parameters()])
    second = gradients(b, [*wanted, *(layer.get_parameter(name) for name in names)])
    torch.testing.assert_close(second, first, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}],
    ids=["plain", "no bias", "layers", "bidirectional", "batch first"],
)
@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("kind", PAIRS)
def test_padded(kind: str, normalize: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch_layer, layer = pair(kind, normalize, dtype, **options)
    x = torch.randn(4, 4, 3, dtype=dtype, requires_grad=True)
    assert_same(torch_layer(x), layer(x), torch_layer, layer, [x], 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_packed(kind: str, bidirectional: bool, enforce_sorted: bool) -> None:
    torch_layer, layer = pair(kind, "recurrent", num_layers=2, bidirectional=bidirectional)
    lengths = [6, 5, 2, 2] if enforce_sorted else [2, 6, 2, 5]
    x = torch.randn(6, 4, 3, requires_grad=True)
    states = tuple(
        torch.randn(4 if bidirectional else 2, 4, 5, requires_grad=True) for _ in range(1 + (kind == "LSTM"))
    )
    hx = states if kind == "LSTM" else states[0]
    theirs, theirs_final = torch_layer(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), hx)
    ours, ours_final = layer(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), hx)
    assert isinstance(ours, PackedSequence)
    assert ours.batch_sizes.tolist() == theirs.batch_sizes.tolist()
    if not enforce_sorted:
        assert ours.unsorted_indices.tolist() == theirs.unsorted_indices.tolist()
    assert_same([theirs.data, theirs_final], [ours.data, ours_final], torch_layer, layer, [x, *states], 1e-6)


@pytest.mark.parametrize("kind", PAIRS)
def test_unbatched(kind: str) -> None:
    torch_layer, layer = pair(kind, "recurrent", bidirectional=True, batch_first=True)
    x = torch.randn(6, 3, requires_grad=True)
    states = tuple(torch.randn(2, 5, requires_grad=True) for _ in range(1 + (kind == "LSTM")))
    hx = states if kind == "LSTM" else states[0]
    assert_same(torch_layer(x, hx), layer(x, hx), torch_layer, layer, [x, *states], 1e-6)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, batched: bool) -> None:
    theirs, ours = CELLS[kind]
    torch_cell, cell = theirs(3, 5), identity(ours(3, 5))
    cell.load_state_dict(torch_cell.state_dict(), strict=False)
    x = torch.randn(*((4,) if batched else ()), 3, requires_grad=True)
    assert_same(torch_cell(x), cell(x, step=7), torch_cell, cell, [x], 1e-6)


@pytest.mark.parametrize("kind", PAIRS)
def test_same_seed_same_parameters(kind: str) -> None:
    theirs, ours = PAIRS[kind]
    torch.manual_seed(3)
    torch_layer = theirs(3, 5, 2, bidirectional=True)
    torch.manual_seed(3)
    layer = ours(3, 5, 2, bidirectional=True)
    for name, parameter in torch_layer.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter), name


def test_dropout_acts_between_layers() -> None:
    torch_layer, layer = pair("LSTM", "recurrent", num_layers=2, dropout=1.0)
    for module in (torch_layer, layer):
        module.train()
    for module in layer.children():
        module.eval()  # the normalization stays the identity
    x = torch.randn(4, 4, 3)
    torch.testing.assert_close(layer(x)[0], torch_layer(x)[0])
    assert not torch.allclose(layer(x)[0], layer.eval()(x)[0])


def test_takes_torchs_packed_sequences_of_one_length() -> None:
    layer = BatchNormGRU(3, 5)
    x = torch.randn(4, 2, 3)
    padded = layer(x)[0]
    packed = layer(pack_sequence(list(x.unbind(1))))[0]
    torch.testing.assert_close(packed.data, padded.flatten(0, 1))
