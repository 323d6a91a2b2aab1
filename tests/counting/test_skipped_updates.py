"""A batch with a NaN or an infinity in a channel leaves that channel's running statistics alone, and is counted."""

from __future__ import annotations

import copy

import pytest
import torch

import keelnorm as kn

BAD = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("way", ["native", "reference", "compiled", "inplace"])
@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 4, 4), (2, 5, 40, 40)], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_only_the_poisoned_channel_stays(bad, shape, way, momentum):
    layer = kn.BatchNorm(5, momentum=momentum)
    layer(torch.randn(shape))
    before, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(shape)
    clean = x.clone()
    x[1, 3] = bad
    with kn.kernels.use("reference" if way == "reference" else "auto"):
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
    layer = kn.BatchNorm2d(3)
    assert "skipped_updates" not in dict(layer.named_buffers())
    assert layer.state_dict().keys() == torch.nn.BatchNorm2d(3).state_dict().keys()
    layer.skipped_updates += 2
    assert copy.deepcopy(layer).skipped_updates.tolist() == [2, 2, 2]
    layer.reset_running_stats()
    assert layer.skipped_updates.tolist() == [0, 0, 0]
    assert kn.BatchNorm2d(3, track_running_stats=False).skipped_updates is None


def test_evaluation_and_clean_batches_count_nothing():
    layer = kn.BatchNorm1d(2)
    layer(torch.randn(4, 2))
    layer.eval()(torch.full((4, 2), torch.nan))
    assert layer.skipped_updates.tolist() == [0, 0]


# What is stored has to be finite, not only what was computed.

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("way", ["native", "reference", "compiled", "compiled reference", "inplace", "groups"])
def test_one_large_value_in_half_precision(way):
    x = torch.randn(64, 2).half()
    x[0, 0] = 30000
    layer = (kn.GhostBatchNorm(2, 32) if way == "groups" else kn.BatchNorm1d(2)).half()
    with kn.kernels.use("reference" if "reference" in way else "auto"):
        if "compiled" in way:
            torch._dynamo.reset()
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        else:
            layer(x, **({"inplace": True} if way == "inplace" else {}))
    assert layer.running_mean[0] == 0
    assert layer.running_var[0] == 1
    assert layer.running_mean[1] != 0
    assert layer.skipped_updates.tolist() == [1, 0]


@pytest.mark.parametrize("way", ["native", "reference", "compiled reference"])
def test_what_fits_once_it_is_averaged_is_stored(way):
    """The batch's variance alone does not fit into float16: a tenth of it does."""
    x = torch.tensor([[-300.0], [300.0]]).half()
    layer = kn.BatchNorm1d(1).half()
    torch._dynamo.reset()
    with kn.kernels.use("reference" if "reference" in way else "auto"):
        (torch.compile(layer, fullgraph=True, backend="aot_eager") if "compiled" in way else layer)(x)
    assert layer.running_var.item() == torch.tensor(0.9 + 0.1 * 180000).half().item()
    assert layer.skipped_updates.tolist() == [0]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_is_what_the_dtype_rounds_to_infinity(dtype, kernels):
    """Means in double around the largest number of the buffers' dtype."""
    largest = torch.finfo(dtype).max
    half_step = (largest - torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0, dtype=dtype)).item()) / 2
    at = torch.tensor([largest + share * half_step for share in (0, 0.99, 1, 1.01)], dtype=torch.float64)
    layer = kn.BatchNorm1d(4, momentum=1.0, dtype=dtype)
    fits = at.to(dtype).isfinite()
    with kn.kernels.use(kernels):
        layer(torch.stack([at, at]))
    assert layer.running_mean.tolist() == torch.where(fits, at, 0).to(dtype).tolist()
    assert layer.skipped_updates.tolist() == (~fits).long().tolist()
    assert fits.tolist() == [True, True, False, False]


def test_a_variance_beyond_float32():
    layer = kn.BatchNorm1d(1)
    layer(torch.tensor([[-1e30], [1e30]]))
    assert (layer.running_mean.item(), layer.running_var.item()) == (0, 1)
    assert layer.skipped_updates.tolist() == [1]


def test_covariances_are_stored_where_they_are_finite():
    layer = kn.WhiteningBatchNorm(2, group_size=1).half()
    x = torch.randn(64, 2).half()
    x[0, 0] = 30000
    layer(x)
    assert layer.running_cov[0].item() == 1
    assert 0 < layer.running_cov[1].item() != 1
