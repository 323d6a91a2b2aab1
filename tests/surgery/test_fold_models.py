"""Published architectures: which batch norms fold, why others do not, and that the output stays."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from surgery.folded import bits, output, randomize, relative
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import keelnorm as kn


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # restored after each test; several would wait for each other where tests share cores


def check(model, *args, folded: int, left: int):
    """Fold a float64 model exactly and a float32 one up to rounding; return the reasons of layers that are left."""
    randomize(model)
    x = [each.float() for each in args]
    before, expected = bits(model), output(copy.deepcopy(model).double(), *args)
    new, report = kn.fold(model, tuple(x))
    assert bits(model) == before
    assert (report.summary["folded"], report.summary["left"]) == (folded, left), report
    assert report.summary["float64"] < 1e-12
    assert report.summary["difference"] < 1e-5
    assert relative(output(new, *x), expected) < 1e-4
    assert all(row["difference"] < 1e-6 for row in report.rows if row["into"])
    wide, _ = kn.fold(copy.deepcopy(model).double(), args, inplace=True)
    assert relative(output(wide, *args), expected) < 1e-10
    assert sum(isinstance(module, _BatchNorm) for module in wide.modules()) == left
    return collections.Counter(row["reason"] for row in report.rows if row["reason"])


def image(size: int = 224) -> torch.Tensor:
    return torch.randn(1, 3, size, size).double()


def pytorchcv(name: str) -> nn.Module:
    return pytest.importorskip("pytorchcv.model_provider").get_model(name)


@pytest.mark.parametrize(("name", "folded"), [("resnet18_wd4", 21), ("mobilenetv2_wd4", 53), ("shufflenetv2_wd2", 56)])
def test_convolution_then_norm(name, folded):
    assert not check(pytorchcv(name), image(), folded=folded, left=0)


def test_an_original_resnet():
    assert not check(pytorchcv("resnet18"), image(), folded=20, left=0)


def test_pre_activation():
    reasons = check(pytorchcv("preresnet18_wd4"), image(), folded=9, left=9)
    assert all("read by add" in why or "comes from add" in why or "comes from max_pool2d" in why for why in reasons)
    assert all("its output is read by relu" in why for why in reasons)


def test_dense_connections():
    reasons = check(pytorchcv("densenet121"), image(), folded=59, left=62)
    assert all("cat" in why or "avg_pool2d" in why or "max_pool2d" in why for why in reasons)


def test_a_volume():
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 8, 4), norm="batch")
    x = torch.randn(1, 1, 16, 16, 16).double()
    norms = sum(isinstance(module, _BatchNorm) for module in net.modules())
    assert not check(net, x, folded=norms, left=0)


def test_a_volume_with_transposed_convolutions():
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="batch"
    )
    transposed = [path for path, module in net.named_modules() if isinstance(module, nn.ConvTranspose3d)]
    norms = sum(isinstance(module, _BatchNorm) for module in net.modules())
    assert not check(net, torch.randn(1, 1, 16, 16, 16).double(), folded=norms, left=0)
    _, report = kn.fold(net, torch.randn(1, 1, 16, 16, 16))
    assert set(transposed) & {row["into"] for row in report.rows}


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=3
    )
    model = randomize(transformers.ResNetForImageClassification(config))
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    example = transformers.BatchFeature({"pixel_values": image(32).float(), "output_hidden_states": True})
    before = bits(model)
    new, report = kn.fold(model, example)
    assert bits(model) == before
    assert report.summary["folded"] == norms
    assert report.summary["float64"] < 1e-12
    with torch.no_grad():
        expected, found = model(**example), new(**example)
    for a, b in zip((expected.logits, *expected.hidden_states), (found.logits, *found.hidden_states), strict=True):
        assert relative(b, a) < 1e-5


def test_attention_over_a_convolution():
    transformers = pytest.importorskip("transformers")
    config = transformers.LevitConfig(
        hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2], image_size=64,
    )  # fmt: skip
    model = randomize(transformers.LevitForImageClassification(config))
    _, report = kn.fold(model, {"pixel_values": image(64).float()})
    assert report.summary["float64"] < 1e-12
    assert report.summary["left"] == 0  # linear layers over tokens, whose samples and positions are merged between
    assert [row["where"] for row in report.rows] == ["before"] * 26 + ["after"]
