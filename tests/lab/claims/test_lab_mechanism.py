"""Covariate shift, gradients, γ and β alone, placement and the loss's landscape: formulas and draws."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from keelnorm.lab.claims import _covariate_shift_training, affine_only, gradients, loss_landscape
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.core.threads import one_thread
from keelnorm.lab.data import images
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.stacks import StackedMLP
from keelnorm.lab.training.train import losses


@pytest.fixture(autouse=True)
def _as_cells_run():
    with one_thread():
        yield


def small(arm, **how):
    return StackedMLP(6, (8, 8, 8), 3, arm, generator(draw="test"), **how).double().train()


def batch():
    draw = generator(draw="test batch")
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (40,), generator=draw)


def at(stack, parameters, x, y):
    """Loss and gradients of a network at other parameters, by `torch.func` and not in place."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    buffers = {name: value.clone() for name, value in stack.named_buffers()}
    loss = F.cross_entropy(functional_call(stack, (leaves, buffers), (x,))[0], y)
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


# What the tasks compute


@pytest.mark.parametrize("arm", [NONE, BN], ids=lambda arm: arm.name)
def test_the_cosine_is_that_of_the_definition(arm):
    """Santurkar et al. 2018, definition 2.1: one gradient before, one after the step of the layers ahead alone."""
    stack, (x, y), rate = small(arm), batch(), 0.7
    own = {name: value.detach().clone() for name, value in stack.named_parameters()}
    _, before = at(stack, own, x, y)
    ahead = [name for name in own if int(name.split(".")[1]) < _covariate_shift_training.PROBED]
    assert any(name.startswith("weights") for name in ahead)
    assert any(name.startswith("blocks") for name in ahead) == (arm is BN)
    _, after = at(stack, {n: v - rate * before[n] if n in ahead else v for n, v in own.items()}, x, y)
    probed = f"weights.{_covariate_shift_training.PROBED}"
    expected = F.cosine_similarity(before[probed].flatten(), after[probed].flatten(), dim=0).item()
    assert expected < 0.999

    losses(stack, x, y).sum().backward()
    found = _covariate_shift_training.cosine_after_earlier_layers(stack, x, y, torch.tensor([rate]))
    assert found.tolist() == pytest.approx([expected], abs=2e-5)


@pytest.mark.parametrize("arm", [NONE, BN], ids=lambda arm: arm.name)
def test_the_landscape_along_the_gradient_is_that_of_the_definition(arm):
    stack, (x, y) = small(arm), batch()
    own = {name: value.detach().clone() for name, value in stack.named_parameters()}
    loss, gradient = at(stack, own, x, y)
    seen = [
        at(stack, {n: v - size * gradient[n] for n, v in own.items()}, x, y) for size in loss_landscape.REACH
    ]  # fmt: skip
    values = [loss.item(), *(value.item() for value, _ in seen)]
    length = math.sqrt(sum(each.square().sum().item() for each in gradient.values()))
    changes = [math.sqrt(sum((moved[n] - gradient[n]).square().sum().item() for n in own)) for _, moved in seen]
    found = loss_landscape.look_around(stack, x, y)
    assert found["variation"] == pytest.approx(max(values) - min(values))
    assert found["change"] == pytest.approx(max(changes))
    over = [change / (size * length) for change, size in zip(changes, loss_landscape.REACH, strict=True)]
    assert found["smoothness"] == pytest.approx(max(over))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradient_norms_are_those_of_a_network_written_out(monkeypatch, activation):
    depth = 12
    monkeypatch.setattr(gradients, "DEPTH", depth)
    found = gradients.gradient_norms(data="digits", activation=activation, arm="none", seed=0)

    split = images("digits", 0)
    widths = (gradients.WIDTH,) * depth
    draw = generator(draw="initialization", data="digits", seed=0)
    how = {"activation": activation, "initialization": gradients.ACTIVATIONS[activation]}
    stack = StackedMLP(64, widths, 10, NONE, draw, **how).double()
    order = torch.randperm(len(split.train_y), generator=generator(draw="order", data="digits", seed=0))
    chosen = order[: gradients.BATCH]
    h, received = split.train_x[chosen].flatten(1).double(), []
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        z = h @ weight.t() + bias
        if layer < depth:
            received.append(z)
            h = {"tanh": torch.tanh, "relu": torch.relu}[activation](z)
    each = torch.autograd.grad(F.cross_entropy(z, split.train_y[chosen]), received)
    norms = [gradient.norm().item() for gradient in each]
    assert found["log10"] == pytest.approx([math.log10(norm) for norm in norms], abs=1e-3)
    middle = norms[gradients.SKIPPED : -gradients.SKIPPED]
    assert found["factor"] == pytest.approx((middle[0] / middle[-1]) ** (1 / (len(middle) - 1)), rel=1e-3)


def test_at_every_layer_s_input_is_behind_every_activation_and_on_the_network_s_input():
    x, _ = batch()
    normalized = F.batch_norm(x, None, None, training=True)
    assert torch.allclose(small(BN, place="input")(x), small(BN, place="after")(normalized), atol=1e-4)
    assert not torch.allclose(small(BN, place="input")(x), small(BN, place="after")(x), atol=1e-2)


def test_only_what_an_arm_names_is_trained(monkeypatch):
    moved: dict[str, set[str]] = {}

    def watched(stack, *args, **how):
        before = {name: value.detach().clone() for name, value in stack.named_parameters()}
        history = train(stack, *args, **how)
        moved[arm] = {name for name, value in stack.named_parameters() if not torch.equal(value, before[name])}
        return history

    train = affine_only.train
    monkeypatch.setattr(affine_only, "train", watched)
    counts = {}
    for arm in affine_only.ARMS:
        found = affine_only.train_partly(data="digits", arm=arm, depth=2, seed=0, rates=(0.1, 0.3), steps=3)
        counts[arm] = found["trained"]
        assert found["total"] == 64 * 128 + 128 * 128 + 128 * 10 + 10 + 4 * 128
    assert moved["affine"] == {f"blocks.{layer}.0.{name}" for layer in (0, 1) for name in ("weight", "bias")}
    assert moved["output"] == {"weights.2", "biases.2"}
    assert moved["all"] == moved["affine"] | moved["output"] | {"weights.0", "weights.1"}
    assert counts == {"affine": 4 * 128, "output": 1290, "all": found["total"]}


# Draws

RUNS = {
    "drift": (_covariate_shift_training.drift, "arm", ("none", "bn", "noisy"), {"steps": 4, "rates": (0.3, 1.0)}),
    "gradient": (
        _covariate_shift_training.gradient_change,
        "arm",
        ("none", "bn"),
        {"activation": "relu", "centered": True, "steps": 4, "rates": (0.1, 0.3)},
    ),
    "norms": (gradients.gradient_norms, "arm", ("none", "bn"), {"activation": "tanh"}),
    "affine": (
        affine_only.train_partly,
        "arm",
        tuple(affine_only.ARMS),
        {"depth": 2, "rates": (0.1, 0.3), "steps": 3},
    ),
    "landscape": (loss_landscape.landscape, "arm", ("none", "bn"), {"activation": "relu", "steps": 12}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_cell_repeats_and_its_arms_share_initialization_and_order(monkeypatch, name):
    task, axis, arms, axes = RUNS[name]
    module = __import__(task.__module__, fromlist=["generator"])
    drawn = []

    def recording(**given):
        drawn.append(given)
        return generator(**given)

    monkeypatch.setattr(module, "generator", recording)
    found = {}
    for arm in arms:
        drawn.clear()
        first = task(data="digits", seed=1, **{axis: arm}, **axes)
        found[arm] = [each for each in drawn if each["draw"] in ("initialization", "order")]
        assert task(data="digits", seed=1, **{axis: arm}, **axes) == first
        assert task(data="digits", seed=2, **{axis: arm}, **axes) != first
        assert [each["draw"] for each in found[arm][:2]] == ["initialization", "order"]
    assert all(each == found[arms[0]] for each in found.values())
