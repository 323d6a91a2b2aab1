"""Which operations may lie between a batch norm and the layer that it is folded into."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from surgery.folded import check_folds, randomize, reason
from torch import nn

import keelnorm as kn

C = 4
X = (2, C, 8, 6)


class Between(nn.Module):
    """A convolution, an operation and a batch norm; or in the opposite order."""

    def __init__(self, first: nn.Module, between, last: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = first, between, last

    def forward(self, x):
        return self.last(self.between(self.first(x)))


#: Functions of a (N, C, H, W) tensor that gives one of that kind.
COMMUTE = {
    "identity": nn.Identity(),
    "dropout": nn.Dropout().eval(),
    "dropout2d": nn.Dropout2d().eval(),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(memory_format=torch.channels_last),
    "detach": lambda x: x.detach(),
    "avg_pool2d": nn.AvgPool2d(2),
    "avg_pool2d, ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
    "avg_pool2d, padded": nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d((3, 2)),
    "nearest": nn.Upsample(scale_factor=2),
    "nearest-exact": nn.Upsample(scale_factor=1.5, mode="nearest-exact"),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=(3, 3), mode="area"),
    "reflect": nn.ReflectionPad2d(1),
    "replicate": nn.ReplicationPad2d(1),
    "view": lambda x: x.view(x.size(0), C, 6, 8),
    "transpose": lambda x: x.transpose(2, 3),
    "there and back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "mean": lambda x: x.mean(3, keepdim=True),
    "several": nn.Sequential(nn.AvgPool2d(2), nn.Dropout().eval(), nn.Upsample(scale_factor=2), nn.Identity()),
}  # fmt: skip
DO_NOT = {
    "avg_pool2d, padded": (nn.AvgPool2d(3, 1, padding=1), "avg_pool2d"),
    "avg_pool2d, divided": (nn.AvgPool2d(2, divisor_override=3), "avg_pool2d"),
    "max_pool2d": (nn.MaxPool2d(2), "max_pool2d"),
    "zeros": (nn.ZeroPad2d(1), "pad"),
    "zeros, none of them here": (lambda x: F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), "pad"),
    "relu": (nn.ReLU(), "relu"),
    "relu in place": (nn.ReLU(inplace=True), "relu"),
    "shuffle": (nn.ChannelShuffle(2), "channel_shuffle"),
    "times two": (lambda x: x * 2, "mul"),
    "added to": (lambda x: x + 1, "add"),
    "in place": (lambda x: x.add_(1), "add"),
    "another dtype": (lambda x: x.float().double(), "float double"),
    "to another dtype": (lambda x: x.to(torch.float32).to(torch.float64), "to"),
    "over channels": (lambda x: x.mean(1, keepdim=True).expand(-1, C, -1, -1), "mean expand"),
    "samples and channels": (lambda x: x.transpose(0, 1).reshape(2, C, 8, 6), "reshape transpose"),
    "channels and positions": (lambda x: x.reshape(2, 8, C, 6).transpose(1, 2), "reshape transpose"),
}


@pytest.mark.parametrize("name", COMMUTE)
def test_after_a_convolution(name):
    model = randomize(Between(nn.Conv2d(C, C, 1), COMMUTE[name], nn.BatchNorm2d(C))).double()
    model.between.eval() if isinstance(model.between, nn.Module) else None
    check_folds(model, torch.randn(X).double(), into={"last": ("first", "before")})


@pytest.mark.parametrize("name", COMMUTE)
def test_before_a_convolution(name):
    model = randomize(Between(nn.BatchNorm2d(C), COMMUTE[name], nn.Conv2d(C, 3, 1, groups=1))).double()
    check_folds(model, torch.randn(X).double(), into={"first": ("last", "after")})


@pytest.mark.parametrize("name", DO_NOT)
def test_what_does_not_commute(name):
    between, functions = DO_NOT[name]
    for model in (
        Between(nn.Conv2d(C, C, 1), between, nn.BatchNorm2d(C)),
        Between(nn.BatchNorm2d(C), between, nn.Conv2d(C, C, 1)),
    ):
        why = reason(randomize(model).double(), torch.randn(X).double())
        assert any(f"{each};" in why or f"{each} (in" in why or why.endswith(each) for each in functions.split()), why


@pytest.mark.parametrize(
    "flat",
    [nn.Flatten(), lambda x: x.flatten(1), lambda x: torch.flatten(x, 1), lambda x: x.view(x.size(0), -1),
     lambda x: x.squeeze(3).squeeze(2), lambda x: x.mean((2, 3)), lambda x: x.squeeze()],
)  # fmt: skip
def test_pooled_features(flat):
    pool = nn.AdaptiveAvgPool2d(1)
    model = randomize(nn.Sequential(nn.Conv2d(C, 5, 3), pool, Function(flat), nn.BatchNorm1d(5))).double()
    check_folds(model, torch.randn(X).double(), into={"3": ("0", "before")})
    model = randomize(nn.Sequential(nn.BatchNorm2d(C), pool, Function(flat), nn.Linear(C, 3))).double()
    check_folds(model, torch.randn(X).double(), into={"0": ("3", "after")})


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_flattening_that_merges_channels_and_positions():
    model = randomize(nn.Sequential(nn.BatchNorm2d(C), nn.Flatten(), nn.Linear(C * 48, 3))).double()
    assert "flatten" in reason(model, torch.randn(X).double())


def test_a_linear_layer_over_tokens():
    x = torch.randn(2, 7, 3).double()
    model = nn.Sequential(nn.Linear(3, C), Function(lambda x: x.transpose(1, 2)), nn.BatchNorm1d(C))
    check_folds(randomize(model).double(), x, into={"2": ("0", "before")})
    model = nn.Sequential(nn.BatchNorm1d(7), Function(lambda x: x.transpose(1, 2)), nn.Linear(7, C))
    check_folds(randomize(model).double(), x, into={"0": ("2", "after")})
    model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7))  # normalizes positions, not the layer's channels
    assert "channels are not those of Linear '0'" in reason(randomize(model).double(), x)
    model = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(3, C))
    assert "channels are not those of Linear '1'" in reason(randomize(model).double(), x)


def test_a_layer_on_a_single_sample():
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6))  # (6, 6) without a batch: dimension 1 is the length
    assert "channels are not those of Conv1d '0'" in reason(randomize(model).double(), torch.randn(3, 6).double())


def test_one_channel():
    model = nn.Sequential(nn.Conv2d(C, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(1))
    check_folds(randomize(model).double(), torch.randn(X).double())


def test_dropout_that_drops():
    model = randomize(nn.Sequential(nn.Conv2d(C, C, 1), nn.Dropout(), nn.BatchNorm2d(C), nn.ReLU())).double()
    model[1].train()
    _, report = kn.fold(model, torch.randn(X).double())
    assert "its input comes from dropout" in report.rows[0]["reason"]
    assert report.summary["difference"] == 0  # the same random numbers in both runs
