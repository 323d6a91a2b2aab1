"""What a layer keeps: running statistics per step, and how they are copied, saved, repeated and compiled."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from recurrent_oracle import flat, randomize
from support.noted import noted
from torch.utils.checkpoint import checkpoint

from keelnorm.control import accumulate_statistics, pause_statistics
from keelnorm.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM
from keelnorm.nn.recurrent.stepwise import StepwiseBatchNorm

LAYERS = [BatchNormLSTM, BatchNormGRU]


def buffers(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_of_the_input_term(momentum: float | None) -> None:
    layer = BatchNormLSTM(3, 4, max_length=4, momentum=momentum, dtype=torch.float64)
    batches = [torch.randn(length, 5, 3, dtype=torch.float64) for length in (3, 6, 2)]
    mean, var = torch.zeros(4, 16, dtype=torch.float64), torch.ones(4, 16, dtype=torch.float64)
    seen = [0] * 4
    for x in batches:
        layer(x)
        for t in range(min(len(x), 4)):
            term = x[t] @ layer.weight_ih_l0.detach().t()
            seen[t] += 1
            factor = 1 / seen[t] if momentum is None else momentum
            mean[t] = (1 - factor) * mean[t] + factor * term.mean(0)
            var[t] = (1 - factor) * var[t] + factor * term.var(0, correction=1)
    norm = layer.norm_ih_l0
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked.tolist() == seen == [3, 3, 2, 1]


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("make", LAYERS)
def test_under_control(make: type, normalize: str) -> None:
    """Paused nothing counts; pooled, every step is one batch of all sequences, with its own number of them."""
    layer = make(3, 4, max_length=4, normalize=normalize, momentum=0.3, dtype=torch.float64)
    start, once = buffers(layer), copy.deepcopy(layer)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    with pause_statistics(layer):
        layer(x)
    assert all(torch.equal(start[name], value) for name, value in buffers(layer).items())
    with accumulate_statistics(layer):
        twin = copy.deepcopy(layer)
        layer(x)
        assert all(torch.equal(start[name], value) for name, value in buffers(layer).items())
    once(x)
    twin(x)
    for name, value in buffers(once).items():
        torch.testing.assert_close(buffers(layer)[name], value)
        assert torch.equal(buffers(twin)[name], value)


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("make", LAYERS)
def test_evaluation_of_many_steps(make: type, normalize: str) -> None:
    """Beyond max_length the last step's moments hold: as if its row were repeated."""
    short = randomize(make(3, 4, max_length=3, normalize=normalize), trained=True)
    long = make(3, 4, max_length=9, normalize=normalize)
    state = short.state_dict()
    for name, value in state.items():
        if normalize == "recurrent" and ("running" in name or "tracked" in name):
            state[name] = torch.cat([value, *[value[-1:]] * 6])
    long.load_state_dict(state)
    x = torch.randn(9, 2, 3)
    torch.testing.assert_close(short.eval()(x), long.eval()(x), rtol=0, atol=0)


def test_steps_that_training_has_not_reached() -> None:
    layer = BatchNormGRU(3, 4, max_length=8, momentum=None, dtype=torch.float64)
    layer(torch.randn(3, 6, 3, dtype=torch.float64))
    filled = copy.deepcopy(layer)
    for norm in (filled.norm_ih_l0, filled.norm_hh_l0):
        norm.running_mean[3:], norm.running_var[3:] = norm.running_mean[2], norm.running_var[2]
        norm.num_batches_tracked.fill_(1)
    x = torch.randn(10, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), filled.eval()(x), rtol=0, atol=0)
    filled.norm_hh_l0.running_mean[5] += 1
    assert not torch.allclose(layer(x)[0][5:], filled(x)[0][5:])


@pytest.mark.parametrize("make", LAYERS)
def test_evaluation_leaves_the_buffers(make: type) -> None:
    layer = randomize(make(3, 4, bidirectional=True), trained=True).eval()
    before = buffers(layer)
    layer(torch.randn(5, 1, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("make", LAYERS)
def test_copies(make: type, normalize: str) -> None:
    layer = randomize(make(3, 4, 2, normalize=normalize, max_length=6), trained=True)
    x = torch.randn(5, 3, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    loaded = make(3, 4, 2, normalize=normalize, max_length=6)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded]
    expected = layer(x)
    for other in copies:
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), layer.buffers(), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", LAYERS)
def test_a_checkpoint_updates_once(make: type, use_reentrant: bool) -> None:
    layer = randomize(make(3, 4, bidirectional=True))
    plain = copy.deepcopy(layer)
    x = torch.randn(5, 4, 3, requires_grad=True)

    def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x, lengths=[5, 2, 3, 3])[0]

    checkpoint(run, layer, x, use_reentrant=use_reentrant).square().sum().backward()
    gradient, x.grad = x.grad, None
    run(plain, x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_an_exception_leaves_the_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BatchNormLSTM(3, 4)
    before = buffers(layer)
    steps = 0

    def fail(*_: object, **__: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("out of memory")
        return torch.Tensor.sigmoid(*_)

    monkeypatch.setattr(torch.Tensor, "tanh", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(torch.randn(5, 4, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_a_nan_leaves_the_channels_it_is_in() -> None:
    layer = StepwiseBatchNorm(3, max_length=2)
    x = torch.randn(4, 3)
    x[1, 2] = torch.nan
    layer(x, step=1)
    assert layer.running_mean[1, 2] == 0
    assert layer.running_var[1, 2] == 1
    torch.testing.assert_close(layer.running_mean[1, :2], 0.1 * x[:, :2].mean(0))


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
@pytest.mark.parametrize("make", LAYERS)
def test_half_precision(make: type, normalize: str) -> None:
    layer = randomize(make(3, 8, normalize=normalize), trained=True)
    half = make(3, 8, normalize=normalize)
    half.load_state_dict(layer.state_dict())
    half.bfloat16()
    layer.load_state_dict(half.state_dict())  # the same rounded parameters
    x = torch.randn(12, 6, 3).bfloat16()
    output, final = half(x)
    assert {part.dtype for part in flat([output, final])} == {torch.bfloat16}
    torch.testing.assert_close(output.float(), layer(x.float())[0], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("make", LAYERS)
def test_autocast(make: type) -> None:
    layer = randomize(make(3, 8), trained=True)
    x = torch.randn(12, 6, 3)
    expected = copy.deepcopy(layer)(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("make", LAYERS)
def test_trains(make: type) -> None:
    """The first value of a sequence is told from its end."""
    layer, head = make(1, 16, max_length=12), torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(150):
        x = torch.randn(10, 32, 1)
        loss = (head(layer(x)[0][-1]) - x[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_without_a_break(training: bool) -> None:
    layer = randomize(BatchNormGRU(3, 4, max_length=4), trained=True).train(training)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 3)
    torch.testing.assert_close(compiled(x), plain(x))
    for (name, a), b in zip(layer.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=f"{name}: {{}}".format)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, at a graph break
def test_compiles_with_lengths_and_a_break() -> None:
    layer = randomize(BatchNormLSTM(3, 4), trained=True)
    plain = copy.deepcopy(layer)
    x, lengths = torch.randn(3, 4, 3), torch.tensor([3, 1, 2, 2])
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x, lengths=lengths), plain(x, lengths=lengths))
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", LAYERS)
def test_initial_noise_is_there_in_training_alone_and_where_no_state_is_given(make: type) -> None:
    layer = make(3, 4, initial_noise=0.5)
    given = torch.zeros(1, 6, 4)
    state = (given, given) if make is BatchNormLSTM else given
    x = torch.randn(5, 6, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer(x, state)[0], layer(x, state)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])
    assert torch.equal(layer(x)[0], layer(x, state)[0])
    assert "initial_noise=0.5" in repr(layer)
    assert "initial_noise" not in repr(make(3, 4))


@pytest.mark.parametrize("make", LAYERS)
def test_initial_noise_has_the_deviation_that_was_asked_for(make: type) -> None:
    """What the layers are handed as their first state."""
    layer = make(2, 3, initial_noise=0.7, normalize="input")
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    seen: list[torch.Tensor] = []
    layer._layers = lambda x, seqs, initial: type(layer)._layers(
        layer, x, seqs, (noted(seen, initial[0]), *initial[1:])
    )
    layer(torch.zeros(1, 20000, 2))
    noise = seen[0].flatten()
    assert noise.std().item() == pytest.approx(0.7, rel=0.02)
    assert abs(noise.mean().item()) < 0.02


def test_sequences_that_begin_alike_train_with_initial_noise() -> None:
    """Without it the gradient grows by γ/√ε a step."""
    x = torch.zeros(16, 40, 1)
    x[:, 30:] = torch.randn(16, 10, 1)
    norms = {}
    for noise in (0.0, 0.1):
        layer = BatchNormLSTM(1, 8, batch_first=True, initial_noise=noise)
        layer(x)[0][:, -1].square().sum().backward()
        norms[noise] = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()]).item()
    assert norms[0.1] < 1e3
    assert not norms[0.0] < 1e6
