"""A batch with a NaN or an infinity in a channel leaves that channel's running moments alone, and is counted."""

from __future__ import annotations

import copy

import pytest
import torch

import evenkeel as ek

BAD = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("way", ["native", "reference", "compiled", "inplace"])
@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 4, 4), (2, 5, 40, 40)], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_only_the_poisoned_channel_stays(bad, shape, way, momentum):
    layer = ek.BatchNorm(5, momentum=momentum)
    layer(torch.randn(shape))
    before, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(shape)
    clean = x.clone()
    x[1, 3] = bad
    with ek.kernels.use("reference" if way == "reference" else "auto"):
        if way == "compiled":
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        else:
            layer(x.clone(), inplace=way == "inplace")
    twin(clean)
    others = torch.tensor([0, 1, 2, 4])
    for name in ("running_mean", "running_var"):
        found = getattr(layer, name)
        assert torch.equal(found[3], getattr(before, name)[3]), name
        torch.testing.assert_close(found[others], getattr(twin, name)[others])
        assert not torch.equal(found[others], getattr(before, name)[others])
    assert layer.skipped_updates.tolist() == [0, 0, 0, 1, 0]


def test_the_counter_is_no_part_of_the_state():
    layer = ek.BatchNorm2d(3)
    assert "skipped_updates" in dict(layer.named_buffers())
    assert layer.state_dict().keys() == torch.nn.BatchNorm2d(3).state_dict().keys()
    layer.skipped_updates += 2
    assert copy.deepcopy(layer).skipped_updates.tolist() == [2, 2, 2]
    layer.reset_running_stats()
    assert layer.skipped_updates.tolist() == [0, 0, 0]
    assert ek.BatchNorm2d(3, track_running_stats=False).skipped_updates is None


def test_evaluation_and_clean_batches_count_nothing():
    layer = ek.BatchNorm1d(2)
    layer(torch.randn(4, 2))
    layer.eval()(torch.full((4, 2), torch.nan))
    assert layer.skipped_updates.tolist() == [0, 0]
