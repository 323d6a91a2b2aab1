"""What each module keeps for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn
from keelnorm.engine.fusion.call import all_sizes_wait

ONE = 2 * 4 * 50 * 50 * 4 / 1e6
"""An output of the networks below, in MB."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.silu(self.bn(self.conv1(x))))


def by_path(report: kn.Report, column: str) -> dict[str, float]:
    return {row["path"]: row[column] for row in report.rows if row[column]}


def test_eager_keeps_three_tensors_and_conversion_one_less() -> None:
    """SiLU's input is kept by code of the model itself, whose path is empty."""
    model, x = Net(), torch.randn(2, 3, 50, 50)
    report = kn.kept_memory(model, x)
    assert by_path(report, "kept MB") == pytest.approx({"": ONE, "bn": ONE, "conv2": ONE}, abs=2e-3)
    assert by_path(report, "with save_memory") == by_path(report, "kept MB")  # torch.nn's layers are not recomputed
    with all_sizes_wait():
        model, _ = kn.convert(model)
        for _ in range(2):
            model(x).sum().backward()
        report = kn.kept_memory(model, x)
    assert by_path(report, "kept MB") == pytest.approx({"bn": ONE, "conv2": ONE}, abs=2e-3)
    assert by_path(report, "with save_memory") == pytest.approx({"bn": ONE}, abs=2e-3)
    assert report.summary["kept MB"] == pytest.approx(2 * ONE, abs=2e-3)


def test_nothing_changes() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 50, 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, given = torch.get_rng_state(), x.clone()
    kn.kept_memory(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_largest_batch() -> None:
    model, x = Net(), torch.randn(2, 3, 50, 50)
    report = kn.kept_memory(model, x, limit=100e6)
    assert report.summary["largest batch"] == pytest.approx(100 / (report.summary["kept MB"] / 2), rel=0.01)
    assert kn.kept_memory(model, x, limit=1.0).summary["largest batch"] == 0


def test_arguments_of_every_kind() -> None:
    model, x = Net(), torch.randn(2, 3, 9, 9)
    expected = kn.kept_memory(model, x).rows
    assert kn.kept_memory(model, (x,)).rows == expected
    assert kn.kept_memory(model, {"x": x}).rows == expected


def test_an_error_of_the_model_leaves_it_as_it_was() -> None:
    model = Net().eval()
    with pytest.raises(RuntimeError, match="channels"):
        kn.kept_memory(model, torch.randn(2, 5, 9, 9))
    assert not model.training
    model(torch.randn(2, 3, 9, 9)).sum().backward()  # no hooks are left


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"longest": 0}, "longest is an integer from 1 to 64; got 0"),
        ({"limit": 0}, "limit is a positive number of bytes, or None; got 0"),
        ({"limit": "4GiB"}, "limit is a positive number of bytes, or None; got '4GiB'"),
        ({"limit": float("nan")}, "limit is a positive number of bytes"),
    ],
)
def test_wrong_arguments(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kn.kept_memory(Net(), torch.randn(2, 3, 9, 9), **keywords)


@pytest.mark.parametrize("model", [None, [Net()], Net])
def test_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match="kept_memory"):
        kn.kept_memory(model, torch.randn(2, 3, 9, 9))
