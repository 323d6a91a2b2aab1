"""A stack of replicas is the same as its replicas apart."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from keelnorm.lab.core.seeds import generator
from keelnorm.lab.training.arms import ARMS, GROUPS, arm_named
from keelnorm.lab.training.stacks import ACTIVATIONS, StackedCNN, StackedMLP, draw_weight
from keelnorm.lab.training.train import Descent, losses

RATES = torch.tensor([0.02, 0.1, 0.3])
SCALES = torch.tensor([0.5, 1.0, 2.0])
WIDTHS = (12, 8)
CHANNELS, STRIDES = (4, 8), (1, 2)


class LayerNorm(nn.Module):
    """Layer normalization with a weight and bias for each channel, as torch's for (n, C)."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return F.layer_norm(x, x.shape[1:]) * self.weight.view(shape) + self.bias.view(shape)


def normalization(name, channels, spatial):
    """What the arm is, in torch's own layers, for one network."""
    batch_norm = nn.BatchNorm2d if spatial else nn.BatchNorm1d
    return {
        "none": lambda: None,
        "bn": lambda: batch_norm(channels),
        "torch": lambda: batch_norm(channels),
        "ln": lambda: LayerNorm(channels),
        "gn": lambda: nn.GroupNorm(GROUPS, channels),
    }[name]()


def alone(kind, name, place, activation):
    """One replica as a user would write it, in torch's own layers."""
    modules: list[nn.Module] = [nn.Flatten()] if kind == "mlp" else []
    sizes = [(64, *WIDTHS, 10), (1, *CHANNELS)][kind == "cnn"]
    bias = place != "before" or name == "none"
    hidden = len(WIDTHS) if kind == "mlp" else len(CHANNELS)
    for layer in range(hidden):
        into, out = sizes[layer], sizes[layer + 1]
        if place == "input" and name != "none":
            modules.append(normalization(name, into, kind == "cnn"))
        if kind == "mlp":
            modules.append(nn.Linear(into, out, bias=bias))
        else:
            modules.append(nn.Conv2d(into, out, 3, stride=STRIDES[layer], padding=1, bias=bias))
        norm, act = normalization(name, out, kind == "cnn"), ACTIVATIONS[activation]()
        modules += {"before": [norm, act], "after": [act, norm], "input": [act]}[place]
    if place == "input" and name != "none":
        modules.append(normalization(name, sizes[hidden], kind == "cnn"))
    modules += [nn.Linear(WIDTHS[-1], 10)] if kind == "mlp" else [nn.Flatten(), nn.Linear(CHANNELS[-1] * 16, 10)]
    return nn.Sequential(*(module for module in modules if module is not None))


def stacked(kind, name, place="before", activation="relu", **how):
    draw = generator(draw="test")
    if kind == "mlp":
        return StackedMLP(64, WIDTHS, 10, arm_named(name), draw, SCALES, place=place, activation=activation, **how)
    return StackedCNN(
        1, 8, CHANNELS, STRIDES, 10, arm_named(name), draw, SCALES, place=place, activation=activation, **how
    )


def copied(whole, network, number):
    """The weights of a replica, in a network of its own."""
    layers = [module for module in network if isinstance(module, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for layer, module in enumerate(layers):
            module.weight.copy_(whole.weights[layer].view(whole.replicas, *module.weight.shape)[number])
            if module.bias is not None:
                module.bias.copy_(whole.biases[layer].view(whole.replicas, -1)[number])
    return network


CASES = [
    ("mlp", name, place, "tanh" if place == "after" else "relu")
    for name in ARMS
    for place in ("before", "after", "input")
] + [("cnn", name, place, "relu") for name in ARMS for place in ("before", "after")]


@pytest.mark.parametrize(("kind", "name", "place", "activation"), CASES)
def test_a_stack_is_its_replicas_trained_apart(kind, name, place, activation):
    whole = stacked(kind, name, place, activation).double()
    apart = [copied(whole, alone(kind, name, place, activation).double(), number) for number in range(3)]
    descent = Descent(
        RATES.double(),
        momentum=torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64),
        weight_decay=0.01,
        decay_affine=True,
    )
    optimizers = [
        torch.optim.SGD(each.parameters(), lr=rate, momentum=momentum, weight_decay=0.01)
        for each, rate, momentum in zip(apart, RATES.double().tolist(), (0.0, 0.5, 0.9), strict=True)
    ]
    for _ in range(4):
        x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (20,))
        together = losses(whole, x, y)
        together.sum().backward()
        descent.step(whole)
        separate = []
        for each, optimizer in zip(apart, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(each(x), y)
            loss.backward()
            optimizer.step()
            separate.append(loss.detach())
        torch.testing.assert_close(together.detach(), torch.stack(separate), rtol=1e-7, atol=1e-9)
    whole.eval()
    x = torch.randn(20, 1, 8, 8, dtype=torch.float64)
    expected = torch.stack([each.eval()(x) for each in apart])
    torch.testing.assert_close(whole(x), expected, rtol=1e-6, atol=1e-7)


def test_decay_spares_the_affine_parameters_and_biases_unless_asked():
    whole = stacked("mlp", "bn")
    before = {name: value.detach().clone() for name, value in whole.named_parameters()}
    for parameter in whole.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Descent(torch.full((3,), 0.1), weight_decay=0.5).step(whole)
    for name, value in whole.named_parameters():
        factor = 0.95 if name.startswith("weights") else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_lost_replica_leaves_the_others_alone(kind):
    kept, lost = stacked(kind, "bn"), stacked(kind, "bn")
    with torch.no_grad():
        lost.weights[0].view(3, -1)[0] = float("inf")
    x, y = torch.randn(20, 1, 8, 8), torch.randint(0, 10, (20,))
    for whole in (lost, kept):
        losses(whole, x, y).sum().backward()
        Descent(torch.full((3,), 0.1)).step(whole)
    after = [losses(whole, x, y).detach() for whole in (lost, kept)]
    assert torch.isnan(after[0][0])
    torch.testing.assert_close(after[0][1:], after[1][1:])


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_all_arms_start_from_the_same_weights(kind):
    starts = [stacked(kind, name) for name in ARMS]
    for other in starts[1:]:
        for first, second in zip(starts[0].weights, other.weights, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("initialization", "deviation"),
    [("he", math.sqrt(2 / 64)), ("xavier", math.sqrt(2 / (64 + 200))), ("torch", 1 / math.sqrt(3 * 64))],
)
def test_initial_weights_have_the_deviation_of_their_rule(initialization, deviation):
    drawn = draw_weight((200, 64), initialization, generator(draw="test"))
    assert drawn.std().item() == pytest.approx(deviation, rel=0.03)


def test_dropout_drops_in_training_alone():
    whole = stacked("mlp", "none", dropout=0.5)
    x = torch.randn(20, 1, 8, 8)
    assert not torch.equal(whole(x), whole(x))
    whole.eval()
    assert torch.equal(whole(x), whole(x))


def test_an_unknown_arm_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match="there are none, bn"):
        arm_named("transformer")
