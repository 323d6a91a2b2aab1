"""A batch norm folds into each kind of layer, before and after it; the float64 model's output stays."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery.folded import LAYERS, NORMS, bits, check_folds, output, randomize, relative
from torch import nn

import keelnorm as kn


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # restored after each test; several would wait for each other where tests share cores


@st.composite
def layers(draw, kind: str, transposed: bool | None = None) -> tuple[nn.Module, torch.Tensor]:
    """A layer of one kind with random arguments, and an input for it."""
    make, dims = LAYERS[kind]
    groups = draw(st.integers(1, 3)) if dims else 1
    depthwise = draw(st.booleans()) if dims else False
    channels = groups * (1 if depthwise else draw(st.integers(1, 3)))
    out = groups * draw(st.integers(1, 3))
    bias = draw(st.booleans())
    N = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    if not dims:
        return nn.Linear(channels, out, bias), torch.randn(N, channels)
    options = {"stride": draw(st.integers(1, 2)), "groups": groups, "bias": bias}
    options["padding"] = draw(st.integers(0, 2))
    options["dilation"] = draw(st.integers(1, 2))
    if "Transpose" in kind:
        options["output_padding"] = draw(st.integers(0, max(options["stride"], options["dilation"]) - 1))
    kernel = draw(st.integers(1, 3))
    size = [max(kernel + 3, 5)] * dims
    return make(channels, out, kernel, **options), torch.randn(N, channels, *size)


@pytest.mark.parametrize("kind", LAYERS)
@given(data=st.data())
def test_after_a_layer(kind, data):
    layer, x = data.draw(layers(kind))
    out = getattr(layer, "out_channels", None) or layer.out_features
    norm = NORMS[LAYERS[kind][1]](out, eps=data.draw(st.sampled_from([1e-5, 0.1])), affine=data.draw(st.booleans()))
    model = randomize(nn.Sequential(layer, norm)).double()
    check_folds(model, x.double(), into={"1": ("0", "before")})


@pytest.mark.parametrize("kind", LAYERS)
@given(data=st.data())
def test_before_a_layer(kind, data):
    layer, x = data.draw(layers(kind))
    norm = NORMS[LAYERS[kind][1]](x.shape[1], affine=data.draw(st.booleans()))
    model = randomize(nn.Sequential(nn.Identity(), norm, layer)).double()
    if data.draw(st.booleans()):
        norm.running_mean.zero_()
        if norm.affine:
            nn.init.zeros_(norm.bias)
    exact = not norm.running_mean.any() and (norm.bias is None or not norm.bias.any())
    exact |= "Transpose" not in kind and not any(getattr(layer, "padding", ()))
    check_folds(model, x.double(), into={"1": ("2", "after")} if exact else {})


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
def test_before_a_layer_that_pads_with_what_it_gets(mode, padding):
    conv = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    check_folds(randomize(nn.Sequential(nn.BatchNorm2d(3), conv)).double(), torch.randn(2, 3, 6, 5).double())


@pytest.mark.parametrize(("padding", "size", "folds"), [("same", 1, True), ("valid", 3, True), ("same", 3, False)])
def test_before_a_layer_with_padding_in_words(padding, size, folds):
    model = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, size, padding=padding))).double()
    check_folds(model, torch.randn(2, 3, 6, 5).double(), into={"0": ("1", "after")} if folds else {})


def test_several_into_one_layer():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    into = {"0": ("1", "after"), "2": ("1", "before"), "3": ("1", "before")}
    check_folds(randomize(model).double(), torch.randn(2, 3, 6, 6).double(), into=into)
    x = torch.randn(2, 3, 6, 6) + 5  # rounded once, not thrice
    new, report = kn.fold(model.float(), x)
    assert relative(output(new.double(), x.double()), output(copy.deepcopy(model).double(), x.double())) < 2e-7
    assert report.summary["float64"] < 1e-14


ONES_OF_OURS = {
    "BatchNorm": lambda: kn.BatchNorm(4),
    "BatchNorm2d": lambda: kn.BatchNorm2d(4),
    "SyncBatchNorm": lambda: kn.SyncBatchNorm(4),
    "GhostBatchNorm": lambda: kn.GhostBatchNorm(4, ghost_size=2),
    "BatchRenorm": lambda: kn.BatchRenorm(4),
    "CrossIterationBatchNorm": lambda: kn.CrossIterationBatchNorm(4),
    "MovingAverageBatchNorm": lambda: kn.MovingAverageBatchNorm(4),
    "L1BatchNorm": lambda: kn.L1BatchNorm(4),
    "RangeBatchNorm": lambda: kn.RangeBatchNorm(4),
    "torch.nn.SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "subclass": lambda: type("Mine", (nn.BatchNorm2d,), {})(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
}


@pytest.mark.parametrize("name", ONES_OF_OURS)
def test_kinds_of_batch_norm(name):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), ONES_OF_OURS[name](), nn.ReLU())).double()
    report = check_folds(model, torch.randn(2, 3, 6, 6).double())
    assert report.rows[0]["kind"] == type(model[1]).__name__


def test_lazy_layers_that_have_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3), kn.LazyBatchNorm2d()).double()
    x = torch.randn(2, 3, 6, 6).double()
    model(x)
    check_folds(randomize(model), x)


def test_keelnorms_sequential_and_frozen_layers():
    model = randomize(kn.Sequential(nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))).double()
    kn.freeze(model)
    check_folds(model, torch.randn(2, 3, 6, 6).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_dtypes_are_rounded_once(kind, dtype):
    make, dims = LAYERS[kind]
    layer = make(8, 6, *([3] * bool(dims)))
    model = randomize(nn.Sequential(layer, NORMS[dims](6))).to(dtype)
    x = torch.randn(4, 8, *[6] * dims, dtype=dtype)
    new, report = kn.fold(model, x)
    [row] = report.rows
    assert row["into"] == "0"
    assert row["difference"] <= 16 * torch.finfo(dtype).eps
    assert report.summary["float64"] < 1e-13
    assert {value.dtype for value in new.parameters()} == {dtype}
    wide = copy.deepcopy(model).double()
    scale = (wide[1].weight / (wide[1].running_var + wide[1].eps).sqrt()).detach()
    axis = 1 if "Transpose" in kind else 0
    shape = [-1 if i == axis else 1 for i in range(wide[0].weight.dim())]
    assert torch.equal(new[0].weight, (wide[0].weight.detach() * scale.view(shape)).to(dtype))


def test_float32_moments_beside_half_precision_weights():
    model = randomize(nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)))
    model[0].bfloat16()
    new, report = kn.fold(model, torch.randn(2, 8, 6, 6, dtype=torch.bfloat16))
    assert report.summary["folded"] == 1
    assert new[0].bias.dtype == torch.bfloat16


def test_what_the_new_parameters_are():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    new, _ = kn.fold(model, torch.randn(1, 3, 6, 6))
    assert isinstance(new[0].bias, nn.Parameter)
    assert not new[0].weight.requires_grad
    assert not new[0].bias.requires_grad
    assert new[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert new[2].weight.requires_grad
    assert type(new[1]) is nn.Identity
    assert list(new.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_inplace_changes_the_model_itself():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    conv, x = model[0], torch.randn(2, 3, 6, 6)
    expected = output(model, x)
    new, _ = kn.fold(model, x, inplace=True)
    assert new is model
    assert model[0] is conv
    assert type(model[1]) is nn.Identity
    assert relative(output(model, x), expected) < 1e-6


def test_a_part_of_the_model():
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)))
    new, report = kn.fold(model, torch.randn(2, 3), where="3")
    assert [row["path"] for row in report.rows] == ["3"]
    assert type(new[1]) is nn.BatchNorm1d
    assert type(new[3]) is nn.Identity


def test_folding_twice_does_nothing_more():
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    once, _ = kn.fold(model, torch.randn(2, 3))
    before = bits(once)
    twice, report = kn.fold(once, torch.randn(2, 3), inplace=True)
    assert twice is once
    assert bits(once) == before
    assert report.rows == []
    assert str(report).startswith("fold: folded 0, left 0, difference 0")
