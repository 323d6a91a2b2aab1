"""Cross-iteration batch normalization against a loop that keeps every batch and every weight."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keelnorm.nn.cross_iteration import CrossIterationBatchNorm

EPS = 1e-5
CONV = {"stride": 2, "padding": 1}
WINDOW = 3


def over(x):
    return [0, *range(2, x.dim())]


def spread(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


def taylor(produce, history, theta):
    """mean and E[x²] of each earlier batch at θ, to first order, by the whole Jacobian."""
    found = []
    for data, old in history:

        def statistics(w, data=data):
            x = produce(data, w)
            return torch.stack([x.mean(over(x)), x.square().mean(over(x))])

        slope = torch.autograd.functional.jacobian(statistics, old)  # (2, C, *θ)
        found.append((statistics(old) + (slope * (theta - old)).flatten(2).sum(2)).detach())
    return found


def oracle(produce, history, data, theta, weight, bias):
    """y from section 3 of the paper. ``history`` holds (data, θ) of the batches before, oldest first."""
    x = produce(data, theta)
    now = torch.stack([x.mean(over(x)), x.square().mean(over(x))])
    every = torch.stack([now, *taylor(produce, history, theta.detach())])
    mean = every[:, 0].mean(0)
    var = torch.maximum(every[:, 1], every[:, 0].square()).mean(0) - mean.square()
    return (x - spread(mean, x)) / (spread(var, x) + EPS).sqrt() * spread(weight, x) + spread(bias, x)


PRODUCERS = {
    "conv": (
        lambda: nn.Conv2d(4, 6, 3, bias=False, **CONV),
        (3, 4, 7, 6),
        lambda d, w: nn.functional.conv2d(d, w, **CONV),
    ),
    "grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
        (3, 4, 5, 6),
        lambda d, w: nn.functional.conv2d(d, w, groups=2),
    ),
    "sequence": (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9), lambda d, w: nn.functional.conv1d(d, w)),
    "linear": (lambda: nn.Linear(4, 6, bias=False), (5, 4), lambda d, w: nn.functional.linear(d, w)),
}


def make(kind="conv", dtype=torch.float64, **keywords):
    producer = PRODUCERS[kind][0]().to(dtype)
    norm = CrossIterationBatchNorm(6, dtype=dtype, **{"window": WINDOW, **keywords})
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return nn.Sequential(producer, norm.attach(producer))


def batch(kind="conv", dtype=torch.float64):
    return torch.randn(PRODUCERS[kind][1], dtype=dtype) + 1


def train(net, data, rate=0.02):
    """One step of gradient descent; the output."""
    y = net(data)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None
    return y.detach()


@pytest.mark.parametrize("rate", [0.02, 2.0], ids=["small steps", "steps so large that the maximum acts"])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_forward_and_gradients(kind, rate):
    net, produce = make(kind), PRODUCERS[kind][2]
    conv, norm = net
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    acted = False
    for _ in range(WINDOW + 3):
        data = batch(kind).requires_grad_()
        history = history[-(WINDOW - 1) :]
        acted |= any(bool((nu < mu.square()).any()) for mu, nu in taylor(produce, history, conv.weight.detach()))
        wanted = oracle(produce, history, data, conv.weight, norm.weight, norm.bias)
        inputs = (data, conv.weight, norm.weight, norm.bias)
        dy = torch.randn_like(wanted)
        wanted_gradients = torch.autograd.grad(wanted, inputs, dy)
        y = net(data)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
        gradients = torch.autograd.grad(y, inputs, dy)
        for a, b in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        history.append((data.detach(), conv.weight.detach().clone()))
        with torch.no_grad():
            conv.weight -= rate * torch.randn_like(conv.weight) * 0.1
    assert acted == (rate > 1)


def test_running_statistics_are_those_of_the_batches():
    net, plain = make(), nn.BatchNorm2d(6, dtype=torch.float64)
    for _ in range(4):
        data = batch()
        plain(net[0](data))
        train(net, data)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(net[1], name), getattr(plain, name), rtol=1e-12, atol=1e-12)


def plain_output(net, data):
    return nn.functional.batch_norm(net[0](data), None, None, net[1].weight, net[1].bias, True, 0.0, EPS)


def test_window_of_one_is_batch_norm():
    net = make(window=1)
    for _ in range(3):
        data = batch()
        wanted = plain_output(net, data).detach()
        torch.testing.assert_close(train(net, data), wanted)


def test_burn_in_is_batch_norm_and_the_window_fills_after_it():
    net = make(burn_in=3)
    same = []
    for _ in range(6):
        data = batch()
        wanted = plain_output(net, data).detach()
        same.append(torch.allclose(train(net, data), wanted))
    assert same == [True, True, True, True, False, False]


def test_burn_in_goes_on_from_a_loaded_state():
    net = make(burn_in=3)
    for _ in range(4):
        train(net, batch())
    other = make(burn_in=3)
    train(other, batch())
    other.load_state_dict(net.state_dict())
    assert not other[1]._last
    assert other[1].pools()
    other[1].reset_running_stats()
    assert not other[1].pools()


def test_without_compensation_it_pools_what_was():
    norm = CrossIterationBatchNorm(4, window=3, compensate=False, affine=False, dtype=torch.float64)
    batches = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(5)]
    for number, x in enumerate(batches):
        pool = torch.cat(batches[max(0, number - 2) : number + 1])
        wanted = (x - spread(pool.mean((0, 2)), x)) / (spread(pool.var((0, 2), correction=0), x) + EPS).sqrt()
        torch.testing.assert_close(norm(x), wanted)


def test_batches_of_other_sizes_count_by_their_values():
    norm = CrossIterationBatchNorm(4, window=2, compensate=False, affine=False, dtype=torch.float64)
    first, second = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    norm(first)
    pool = torch.cat([first, second])
    wanted = (second - spread(pool.mean((0, 2)), pool)) / (spread(pool.var((0, 2), correction=0), pool) + EPS).sqrt()
    torch.testing.assert_close(norm(second), wanted)


def test_the_mask_is_as_if_the_rest_were_not_there():
    """Padded sequences, with NaN for padding, against the same samples without it."""
    net, wanted = make("linear"), None
    twin = copy.deepcopy(net)
    mask = torch.tensor([True, True, False, True, True])
    for _ in range(4):
        data = batch("linear")
        wanted = train(twin, data[mask])
        x = net[0](data)
        x = torch.where(mask[:, None], x, torch.nan)
        y = net[1](x, mask=mask)
        (y[mask] * torch.linspace(-1, 1, y[mask].numel(), dtype=y.dtype).view(-1, 6)).sum().backward()
        assert not y[~mask].any()
        torch.testing.assert_close(y[mask], wanted, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.02 * parameter.grad
                parameter.grad = None
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("forwards", [1, 2], ids=["one forward", "two forwards before the backward"])
def test_a_checkpoint_gives_the_same_and_adds_once(forwards):
    net = make()
    twin = copy.deepcopy(net)
    for _ in range(4):
        parts = [batch().requires_grad_() for _ in range(forwards)]
        results = []
        for each, run in ((net, lambda d: checkpoint(net, d, use_reentrant=False)), (twin, twin)):
            ys = [run(data) for data in parts]
            dy = torch.linspace(-1, 1, ys[0].numel(), dtype=torch.float64).view_as(ys[0])
            gradients = torch.autograd.grad(ys, [*each.parameters(), *parts], [dy] * forwards)
            results.append([*ys, *gradients])
            with torch.no_grad():
                for parameter, gradient in zip(each.parameters(), gradients, strict=False):
                    parameter -= 0.02 * gradient
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert len(net[1]._last) == len(twin[1]._last)
        for name, value in net.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name])
    assert len(net[1]._last) == WINDOW - 1


def test_a_forward_without_gradients_uses_the_window_and_adds_nothing():
    net = make()
    for _ in range(3):
        train(net, batch())
    data = batch()
    before = [own.mean.clone() for own, _ in net[1]._last]
    with torch.no_grad():
        quiet = net(data)
    assert [bool(torch.equal(own.mean, b)) for (own, _), b in zip(net[1]._last, before, strict=True)] == [True, True]
    torch.testing.assert_close(quiet, net(data), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(quiet, net(data), rtol=1e-3)


def test_evaluation_and_a_layer_without_running_statistics():
    net = make()
    for _ in range(3):
        train(net, batch())
    net.eval()
    data, norm = batch(), net[1]
    wanted = nn.functional.batch_norm(
        net[0](data), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, EPS
    )
    torch.testing.assert_close(net(data), wanted)
    net = make(track_running_stats=False)
    for _ in range(3):
        data = batch()
        torch.testing.assert_close(net(data), plain_output(net, data))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_goes_on_by_itself(way):
    net = make()
    for _ in range(3):
        train(net, batch())
    other = way(net)
    assert other[1]._producer[0] is other[0]
    for _ in range(3):
        data = batch()
        assert torch.equal(train(other, data), train(net, data))
    train(other, batch())
    assert not torch.equal(other[0].weight, net[0].weight)


def test_a_checkpoint_runs_the_segment_as_often_as_documented():
    net, runs = make(), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    checkpoint(net, batch(), use_reentrant=False)
    assert len(runs) == 3
    with torch.no_grad():
        checkpoint(net, batch(), use_reentrant=False)
    assert len(runs) == 4


def test_under_a_reentrant_checkpoint_the_window_stays_empty():
    net = make()
    for _ in range(3):
        data = batch().requires_grad_()
        y = checkpoint(net, data, use_reentrant=True)
        torch.testing.assert_close(y, plain_output(net, data))
        y.sum().backward()
    assert not net[1]._last


def test_a_producer_that_does_not_train_is_constant():
    net = make()
    net[0].requires_grad_(False)
    loose = CrossIterationBatchNorm(6, window=WINDOW, compensate=False, dtype=torch.float64)
    loose.load_state_dict(net[1].state_dict())
    for _ in range(4):
        data = batch()
        assert torch.equal(net(data), loose(net[0](data)))


def test_paused_it_uses_the_window_and_adds_nothing():
    net = make()
    for _ in range(3):
        train(net, batch())
    twin, data = copy.deepcopy(net), batch()
    net[1].track_running_stats = False
    net(batch())
    assert torch.equal(net(data), twin(data))


def test_another_device_empties_the_window():
    net = make()
    for _ in range(2):
        train(net, batch())
    net[1].double()
    assert len(net[1]._last) == 2
    net[1].to("meta")
    assert not net[1]._last


def test_attaching_changes_neither_state_nor_parameters():
    net = make(dtype=torch.float32)
    assert list(net[1].state_dict()) == list(nn.BatchNorm2d(6).state_dict())
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert len(list(net.modules())) == 3
    nn.BatchNorm2d(6).load_state_dict(net[1].state_dict())
    net[1].load_state_dict(nn.BatchNorm2d(6).state_dict())


def test_the_weight_may_come_with_the_call():
    attached, told = make(), None
    told = copy.deepcopy(attached)
    told[1]._producer = ()
    for _ in range(4):
        data = batch()
        y = told[1](told[0](data), producer_weight=told[0].weight)
        assert torch.equal(y, attached(data))
        assert told[1]._given is None


def test_a_channel_that_was_not_finite_is_left_out():
    net = make()
    train(net, batch())
    data = batch()
    with torch.no_grad():
        x = net[0](data)
    bad = x.clone()
    bad[0, 2] = torch.inf
    quiet = CrossIterationBatchNorm(6, window=3, compensate=False, affine=False, dtype=torch.float64)
    quiet(bad)
    y = quiet(x)
    good = [0, 1, 3, 4, 5]
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 2], nn.functional.batch_norm(x, None, None, training=True)[:, 2])
    pool = torch.cat([bad, x])[:, good]
    wanted = nn.functional.batch_norm(pool, None, None, training=True)[len(x) :]
    torch.testing.assert_close(y[:, good], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_exact(dtype):
    net = make(dtype=torch.float32)
    for layer in net:
        layer.weight.data = layer.weight.data.to(dtype).float()
    half = copy.deepcopy(net)
    half[0].to(dtype)
    for _ in range(4):
        data = batch(dtype=dtype)
        y, wanted = half(data), net(data.float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)
        step = 0.05 * torch.randn_like(net[0].weight)
        with torch.no_grad():
            net[0].weight.copy_((net[0].weight + step).to(dtype))
            half[0].weight.copy_(net[0].weight)


def test_it_leaves_the_graph_for_the_backward():
    """A second forward through the same producer, and a gradient of the weight, are untouched by ∂mean/∂θ."""
    net = make()
    net(batch()).sum().backward()
    net[0].weight.grad = None
    data = batch()
    y = net(data)
    assert net[0].weight.grad is None
    y.square().sum().backward()
    assert net[0].weight.grad is not None


# torch.compile looks at .grad of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compile_leaves_it_to_eager_mode():
    net = make(dtype=torch.float32)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="eager")
    for _ in range(3):
        data = batch(dtype=torch.float32)
        torch.testing.assert_close(compiled(data), twin(data))
        with torch.no_grad():
            net[0].weight += 0.05
            twin[0].weight += 0.05
    assert len(net[1]._last) == WINDOW - 1


def unchanged(norm, call, error, match):
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(error, match=match):
        call()
    assert not norm._last
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


def test_errors():
    net = make(dtype=torch.float32)
    conv, norm = net
    x = torch.randn(2, 6, 4, 4)
    unchanged(norm, lambda: norm(x), ValueError, r"x does not come from the producer's weight \(a float32 tensor")
    other = nn.Conv2d(4, 6, 3)
    strange = other(batch(dtype=torch.float32))
    unchanged(norm, lambda: norm(strange), ValueError, "attach the module whose output")
    alone = CrossIterationBatchNorm(6)
    unchanged(alone, lambda: alone(x), ValueError, r"layer\.attach\(conv\) once.*compensate=False")
    with pytest.raises(ValueError, match=r"6 output channels .* got a float32 tensor of shape \(5, 3\)"):
        norm.attach(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="6 output channels"):
        norm(conv(batch(dtype=torch.float32)), producer_weight=torch.zeros(6))
    with pytest.raises(TypeError, match="transposed"):
        norm.attach(nn.ConvTranspose2d(6, 6, 3))
    with pytest.raises(TypeError, match="attach takes the module in front"):
        norm.attach(nn.ReLU())
    with pytest.raises(ValueError, match=r"window is a number of batches, 1 or more; got 0 \(int\)"):
        CrossIterationBatchNorm(3, window=0)
    with pytest.raises(ValueError, match=r"burn_in is a number of batches, 0 or more; got 1.5 \(float\)"):
        CrossIterationBatchNorm(3, burn_in=1.5)


def test_one_value_per_channel_changes_nothing():
    net = make("linear", dtype=torch.float32)
    unchanged(net[1], lambda: net(torch.randn(1, 4)), ValueError, "one value per channel has no variance")


def test_a_parametrized_weight_within_cached():
    net = make(dtype=torch.float32)
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match=r"parametrize\.cached"):
        net(batch(dtype=torch.float32))
    with nn.utils.parametrize.cached():
        net(batch(dtype=torch.float32))
    assert len(net[1]._last) == 1
