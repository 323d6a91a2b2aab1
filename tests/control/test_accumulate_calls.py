"""Accumulated are the values that the call of a layer counts: its arguments, transforms, forwards of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from control.accumulating import assert_moments, expected_after, layer_of, values
from control.models import Plain, buffers
from torch import nn

import keelnorm as kn
from keelnorm.control import accumulate_statistics


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_in_the_call(inplace):
    layer, x = kn.BatchNorm2d(4), values(2)
    expected = expected_after(buffers(layer), [x], 0.1)
    y = layer.train()(x, activation="leaky_relu")
    layer.reset_running_stats()
    with torch.no_grad(), accumulate_statistics(layer):
        found = [layer(input=part.clone(), activation="leaky_relu", inplace=inplace) for part in x.split(16)]
    assert torch.equal(found[0], y)
    assert_moments(layer, expected)


def test_a_mask_of_a_variant():
    layer, x = Plain(4), values(2)
    mask = torch.arange(16) < 11
    expected = expected_after(buffers(layer), [x[:11]], 0.1)
    with accumulate_statistics(layer):
        for part, valid in zip(x.split(4), mask.split(4), strict=True):
            layer(part, mask=valid)
    assert_moments(layer, expected)


def test_sample_weights():
    """The values 0, 1, 5 count once, once and eight times."""
    layer = kn.BatchNorm1d(1, momentum=1.0)
    x, weight = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([1.0, 1.0, 8.0])
    with accumulate_statistics(layer):
        layer(x, sample_weight=weight)
    assert layer.running_mean.item() == pytest.approx(4.1)
    assert layer.running_var.item() == pytest.approx((4.1**2 + 3.1**2 + 8 * 0.9**2) / 9)


ARGUMENTS = {
    "mask": {"mask": torch.arange(16) % 3 > 0},
    "mask by position": {"mask": torch.arange(16 * 15).view(16, 5, 3) % 4 > 0},
    "mask, keep": {"mask": torch.arange(16) % 3 > 0, "padding": "keep"},
    "weights": {"sample_weight": torch.arange(16) % 3 + 0.5},
    "weights by position": {"sample_weight": (torch.arange(16 * 15).view(16, 5, 3) % 4).float()},
    "both": {"mask": torch.arange(16) % 3 > 0, "sample_weight": torch.arange(16) % 4 + 1.0},
    "all else": {"residual": torch.ones(16, 4, 5, 3), "activation": "relu"},
    "in place": {"activation": "leaky_relu", "inplace": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_every_argument_of_the_call(arguments, dtype):
    """Micro-batches with an argument are as the large batch with it, which torch.nn's layer knows nothing of."""
    layer, x = kn.BatchNorm2d(4), values(2).to(dtype)
    reference = copy.deepcopy(layer)
    reference(x.clone(), **arguments)
    outputs = []
    with accumulate_statistics(layer), torch.no_grad():
        for part in torch.arange(16).split(4):
            given = {name: v[part] if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
            outputs.append((layer(x[part].clone(), **given), copy.deepcopy(layer)(x[part].clone(), **given)))
    assert_moments(layer, buffers(reference))
    assert all(torch.equal(found, alone) for found, alone in outputs)


@pytest.mark.parametrize("too_few", ["running", "skip"])
def test_one_value_per_channel_does_not_count(too_few):
    layer, x = kn.BatchNorm1d(4, too_few=too_few), values(1)
    layer(x)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer):
        layer(torch.full((1, 4), 100.0))
        layer(x)
        layer(x, mask=torch.arange(16) == 3)
    assert_moments(layer, expected)


TRANSFORMS = {
    "vmap": lambda layer: torch.func.vmap(layer),
    "vmap of vmap": lambda layer: lambda x: torch.func.vmap(torch.func.vmap(layer))(x.unflatten(0, (2, 2))),
    "gradients by sample": lambda layer: torch.func.vmap(torch.func.grad(lambda x: layer(x).pow(3).sum())),
    "tangents": lambda layer: lambda x: [torch.func.jvp(layer, (part,), (part,)) for part in x],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
def test_function_transforms(kind, transform):
    """Each instance of a vmapped layer is a forward."""
    layer, x = layer_of(1, kind), values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer) as accumulated:
        transform(layer)(x.view(4, 4, 4))
        assert accumulated.moments[""].count.max().item() == 16
    assert_moments(layer, expected)


class SequenceFirst(nn.BatchNorm1d):
    """For (N, L, C), as many channels as steps, with a mask that says what to leave out."""

    def forward(self, x, ignored=None):
        y = x.clone()
        rows = x[~ignored] if ignored is not None else x.flatten(0, 1)
        y[~ignored if ignored is not None else torch.ones(x.shape[:2], dtype=torch.bool)] = super().forward(rows)
        return y


class Reimplemented(nn.BatchNorm1d):
    """As timm's layers, which repeat torch's code."""

    def forward(self, x):
        mean, var = (None, None) if not self.track_running_stats else (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


class Overwriting(Reimplemented):
    def forward(self, x):
        return x.copy_(super().forward(x))


def test_a_subclass_that_normalizes_something_else_than_it_is_given():
    layer, x = SequenceFirst(4), torch.randn(6, 4, 4) + torch.arange(4) * 5
    ignored = torch.rand(6, 4) > 0.5
    expected = expected_after(buffers(layer), [torch.cat([x[~ignored], x.flatten(0, 1)])], 0.1)
    with accumulate_statistics(layer):
        layer(x, ignored=ignored)
        layer(x)
    assert_moments(layer, expected)


def test_a_subclass_with_a_forward_of_its_own():
    layer, x = Reimplemented(4), values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer):
        for part in x.split(4):
            layer(part)
    assert_moments(layer, expected)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="a Overwriting has a forward of its own that overwrites its input"),
        accumulate_statistics(layer := Overwriting(4)),
    ):
        layer(x.clone())
    assert layer.num_batches_tracked.item() == 0
