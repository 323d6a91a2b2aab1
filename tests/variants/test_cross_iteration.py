"""Cross-iteration batch normalization against a loop that keeps every batch and every weight."""

import copy

import pytest
import torch
from torch import nn
from variants.cross_iteration_parts import (
    EPS,
    PRODUCERS,
    WINDOW,
    batch,
    make,
    oracle,
    plain_output,
    spread,
    taylor,
    train,
)

from keelnorm.nn.cross_iteration import CrossIterationBatchNorm


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
