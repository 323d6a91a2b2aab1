"""Sequences of several lengths: packed, by lengths and by mask."""

from __future__ import annotations

import pytest
import torch
from recurrent_oracle import flat, randomize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from keelnorm.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM

LAYERS = [BatchNormLSTM, BatchNormGRU]
LENGTHS = [3, 6, 2, 3]


def layer_and_copy(make: type, normalize: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    layer, copy = (make(3, 4, normalize=normalize, bidirectional=True, **options) for _ in range(2))
    copy.load_state_dict(randomize(layer).state_dict())
    return layer, copy


def assert_same_buffers(layer: torch.nn.Module, copy: torch.nn.Module) -> None:
    for (name, a), b in zip(layer.named_buffers(), copy.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("make", LAYERS)
def test_packed_lengths_and_mask_are_one(make: type, normalize: str) -> None:
    layer, by_mask = layer_and_copy(make, normalize)
    _, by_lengths = layer_and_copy(make, normalize, batch_first=True)
    by_lengths.load_state_dict(layer.state_dict())
    x = torch.randn(6, 4, 3)
    x[torch.arange(6)[:, None] >= torch.tensor(LENGTHS)] = torch.nan  # what is padding may be anything
    packed, state = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    padded, _ = pad_packed_sequence(packed)
    masked = by_mask(x, mask=torch.arange(6)[:, None] < torch.tensor(LENGTHS))
    lengths = by_lengths(x.transpose(0, 1), lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    torch.testing.assert_close(flat(masked), flat([padded, state]), rtol=0, atol=0)
    torch.testing.assert_close(flat(lengths), flat([padded.transpose(0, 1), state]), rtol=0, atol=0)
    assert_same_buffers(layer, by_mask)
    assert_same_buffers(layer, by_lengths)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert padded[2:, 2].abs().max() == 0


@pytest.mark.parametrize("make", LAYERS)
def test_gradients_of_padding_are_zero(make: type) -> None:
    layer = make(3, 4)
    x = torch.randn(6, 4, 3, requires_grad=True)
    output, _ = layer(x, lengths=LENGTHS)
    output.square().sum().backward()
    valid = torch.arange(6)[:, None] < torch.tensor(LENGTHS)
    assert x.grad[~valid].abs().max() == 0
    assert (x.grad[valid].abs().sum(1) > 0).all()


@pytest.mark.parametrize("make", LAYERS)
def test_a_mask_with_holes_skips_steps(make: type) -> None:
    layer, copy = layer_and_copy(make, "recurrent")
    x = torch.randn(7, 3, 3)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]).bool().t()
    output, final = layer(x, mask=mask)
    short = torch.zeros(4, 3, 3)
    for n in range(3):
        values = x[mask[:, n], n]
        short[: len(values), n] = values
    expected, expected_final = copy(short, lengths=[4, 4, 2])
    for n in range(3):
        torch.testing.assert_close(output[mask[:, n], n], expected[: mask[:, n].sum(), n])
    torch.testing.assert_close(flat(final), flat(expected_final))
    assert output[~mask].abs().max() == 0
    assert_same_buffers(layer, copy)


@pytest.mark.parametrize("make", LAYERS)
def test_a_sequence_of_no_step_keeps_its_state(make: type) -> None:
    layer, copy = layer_and_copy(make, "recurrent")
    x = torch.randn(5, 3, 3)
    number = 2 if make is BatchNormLSTM else 1
    state = tuple(torch.randn(2, 3, 4) for _ in range(number))
    output, final = layer(x, state if number == 2 else state[0], lengths=[4, 0, 5])
    for part, initial in zip(flat(final), state, strict=True):
        assert torch.equal(part[:, 1], initial[:, 1])
    assert output[:, 1].abs().max() == 0
    others = tuple(part[:, [0, 2]] for part in state)
    expected, _ = copy(x[:, [0, 2]], others if number == 2 else others[0], lengths=[4, 5])
    torch.testing.assert_close(output[:, [0, 2]], expected)
    assert_same_buffers(layer, copy)


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("make", LAYERS)
def test_nothing_valid_changes_nothing(make: type, normalize: str) -> None:
    layer, copy = layer_and_copy(make, normalize, num_layers=2)
    output, final = layer(torch.randn(5, 3, 3), mask=torch.zeros(5, 3, dtype=torch.bool))
    assert output.shape == (5, 3, 8)
    assert all(part.abs().max() == 0 for part in flat([output, final]))
    assert_same_buffers(layer, copy)
    empty, (state, *_) = layer(torch.randn(5, 0, 3))
    assert empty.shape == (5, 0, 8)
    assert state.shape[-1] == 4
    assert_same_buffers(layer, copy)


def test_one_sequence_left_is_normalized_by_the_running_statistics() -> None:
    layer = randomize(BatchNormLSTM(3, 4, max_length=6), trained=True)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer(torch.randn(6, 3, 3), lengths=[6, 3, 2])
    for name, buffer in layer.named_buffers():
        changed = (buffer != before[name]).view(6, -1).any(1).tolist()
        assert changed == [True] * 3 + [False] * 3, name
