"""Networks with cross-iteration batch normalization, and the formula of the paper over every batch and weight."""

import torch
from torch import nn

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


def plain_output(net, data):
    return nn.functional.batch_norm(net[0](data), None, None, net[1].weight, net[1].bias, True, 0.0, EPS)
