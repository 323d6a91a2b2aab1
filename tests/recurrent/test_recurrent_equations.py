"""Layers and cells against the papers' equations: values, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_oracle import flat, gradients, layers, randomize
from torch.nn.utils.rnn import pad_sequence

from keelnorm.nn.recurrent.recurrent_cells import BatchNormGRUCell, BatchNormLSTMCell
from keelnorm.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM

KINDS = {"LSTM": BatchNormLSTM, "GRU": BatchNormGRU}
LENGTHS = {"one length": [6] * 5, "several lengths": [6, 2, 5, 5, 1], "one is longest": [3, 7, 2, 3, 1]}


def states(kind: str, blocks: int, batch: int, hidden: int) -> list[torch.Tensor]:
    number = 2 if kind == "LSTM" else 1
    return [torch.randn(blocks, batch, hidden, dtype=torch.float64, requires_grad=True) for _ in range(number)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}],
    ids=["plain", "no bias", "two layers, both directions"],
)
@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_equations(
    kind: str, normalize: str, options: dict[str, Any], lengths: list[int], training: bool
) -> None:
    layer = KINDS[kind](3, 4, normalize=normalize, max_length=5, dtype=torch.float64, **options)
    randomize(layer, trained=True).train(training)
    xs = [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]
    initial = states(kind, layer.num_layers * (1 + layer.bidirectional), len(xs), 4)
    expected, expected_final = layers(layer, xs, initial)
    wanted = [*xs, *initial, *layer.parameters()]
    expected_gradients = gradients([pad_sequence(expected), expected_final], wanted)

    output, final = layer(pad_sequence(xs), tuple(initial) if kind == "LSTM" else initial[0], lengths=lengths)
    torch.testing.assert_close(output, pad_sequence(expected), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(flat(final), expected_final, rtol=1e-9, atol=1e-10)
    actual_gradients = gradients([output, flat(final)], wanted)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-7, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in actual_gradients)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("kind", "make"), [("LSTM", BatchNormLSTMCell), ("GRU", BatchNormGRUCell)])
def test_a_cell_steps_as_the_layer_does(kind: str, make: type, training: bool) -> None:
    layer = randomize(KINDS[kind](3, 4, max_length=4, dtype=torch.float64), trained=True).train(training)
    cell = make(3, 4, max_length=4, dtype=torch.float64).train(training)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    output, final = layer(x)
    state = None
    for t in range(6):
        state = cell(x[t], state, step=t)
        h = state[0] if kind == "LSTM" else state
        torch.testing.assert_close(h, output[t])
    torch.testing.assert_close(flat(state), [part[0] for part in flat(final)])
    for name, buffer in cell.named_buffers():
        head, _, tail = name.partition(".")
        torch.testing.assert_close(buffer, layer.get_buffer(f"{head}_l0.{tail}"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    layer = randomize(KINDS[kind](2, 2, dtype=torch.float64))
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    given = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call = torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x,), {"lengths": [3, 2, 3, 1]}
        )
        return tuple(flat(call))

    assert torch.autograd.gradcheck(run, (x, *given))


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
def test_second_derivatives(normalize: str) -> None:
    layer = randomize(BatchNormLSTM(2, 2, normalize=normalize, dtype=torch.float64))
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))
