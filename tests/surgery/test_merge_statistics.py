"""Merged state_dicts equal plain torch in float64 over all the clients' data."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import keelnorm as kn

C = 3


def client(data, kind=nn.BatchNorm1d, dtype=torch.float32):
    """A batch norm whose running statistics are those of the data."""
    layer = kind(data.shape[1], momentum=1.0, dtype=dtype)
    layer(data.to(dtype))
    return layer.state_dict()


@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    kind=st.sampled_from([nn.BatchNorm1d, kn.BatchNorm1d]),
)
def test_the_moments_are_those_of_all_the_data(sizes, seed, offset, kind):
    g = torch.Generator().manual_seed(seed)
    shifts = [offset * torch.randn(C, generator=g, dtype=torch.float64) for _ in sizes]
    parts = [
        torch.randn(n, C, generator=g, dtype=torch.float64) + shift for n, shift in zip(sizes, shifts, strict=True)
    ]
    union = torch.cat(parts)
    merged, report = kn.merge_statistics([client(x, kind, torch.float64) for x in parts], sizes)
    torch.testing.assert_close(merged["running_mean"], union.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged["running_var"], union.var(0), rtol=1e-9, atol=0)
    assert merged["num_batches_tracked"] == len(sizes)

    means = torch.stack([x.mean(0) for x in parts])
    n = torch.tensor(sizes, dtype=torch.float64)[:, None]
    between = (n * (means - union.mean(0)) ** 2).sum(0) / ((union - union.mean(0)) ** 2).sum(0)
    within = sum(size * x.var(0) for size, x in zip(sizes, parts, strict=True)) / sum(sizes)
    [row] = report.rows
    assert row["path"] == ""
    assert row["spread"] == pytest.approx(between.mean().sqrt().item(), abs=1e-9)
    assert row["variance ratio"] == pytest.approx((union.var(0) / within).mean().item(), rel=1e-9)


def model(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4))
    net.register_buffer("steps", torch.tensor([7]))
    net(torch.randn(4, 2, 6, 6))
    return net


def test_other_tensors_are_weighted_means_and_inputs_stay():
    states = [model(seed).state_dict() for seed in range(3)]
    before = copy.deepcopy(states)
    merged, report = kn.merge_statistics(states, [10, 20, 70])
    assert list(merged) == list(states[0])
    for key in ("0.weight", "0.bias", "1.weight", "4.bias"):
        expected = sum(w * s[key].double() for w, s in zip((0.1, 0.2, 0.7), states, strict=True)).float()
        torch.testing.assert_close(merged[key], expected, rtol=1e-6, atol=1e-7)
        assert merged[key].dtype == torch.float32
    assert merged["steps"] == 7
    assert merged["1.num_batches_tracked"] == 3
    assert [row["path"] for row in report.rows] == ["1", "4"]
    model(9).load_state_dict(merged)
    for value in merged.values():
        value.zero_()
    for state, was in zip(states, before, strict=True):
        for key in state:
            assert torch.equal(state[key], was[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_client_is_itself_in_memory_of_its_own(dtype):
    state = model(0).to(dtype).state_dict()
    merged, _ = kn.merge_statistics([state], [100])
    for key, value in merged.items():
        torch.testing.assert_close(value, state[key])
        assert value.data_ptr() != state[key].data_ptr()


def test_a_count_for_each_batch_norm():
    states = [model(seed).state_dict() for seed in range(2)]
    merged, _ = kn.merge_statistics(states, [[2, 30], torch.tensor([6.0, 10.0])])  # type: ignore[list-item]
    first, last = (torch.stack([s[f"{i}.running_mean"] for s in states]) for i in (1, 4))
    torch.testing.assert_close(merged["1.running_mean"], 0.25 * first[0] + 0.75 * first[1])
    torch.testing.assert_close(merged["4.running_mean"], 0.75 * last[0] + 0.25 * last[1])
    weights = torch.stack([s["0.weight"] for s in states])
    torch.testing.assert_close(merged["0.weight"], (16 * weights[0] + 8 * weights[1]) / 24)


@pytest.mark.parametrize(
    "counts", [(64, 192), np.array([64, 192]), torch.tensor([64, 192])], ids=lambda c: type(c).__name__
)
def test_counts_of_any_kind(counts):
    states = [model(seed).state_dict() for seed in range(2)]
    merged, _ = kn.merge_statistics(iter(states), counts)
    expected, _ = kn.merge_statistics(states, [64.0, 192.0])
    for key, value in expected.items():
        assert torch.equal(merged[key], value)


def test_a_single_value_gives_its_mean_alone():
    one = {"running_mean": torch.tensor([4.0]), "running_var": torch.tensor([123.0])}
    data = torch.tensor([[1.0], [2.0], [6.0]])
    three = {key: value for key, value in client(data).items() if key in one}
    merged, _ = kn.merge_statistics([one, three], [1, 3])
    union = torch.cat([data, torch.tensor([[4.0]])])
    torch.testing.assert_close(merged["running_mean"], union.mean(0))
    torch.testing.assert_close(merged["running_var"], union.var(0))


def test_local_leaves_every_batch_norm_at_home():
    states = [model(seed).state_dict() for seed in range(2)]
    merged, report = kn.merge_statistics(states, [0.25, 0.75], local=True)
    assert list(merged) == ["steps", "0.weight", "0.bias", "3.weight", "3.bias"]
    assert report.summary["left out"] == 2
    mine = model(5)
    norm = copy.deepcopy(mine[1].state_dict())
    mine.load_state_dict(merged, strict=False)
    torch.testing.assert_close(mine[0].weight.detach(), 0.25 * states[0]["0.weight"] + 0.75 * states[1]["0.weight"])
    for key, value in mine[1].state_dict().items():
        assert torch.equal(value, norm[key])


def test_layers_with_rows_of_moments():
    layers = [kn.StepwiseBatchNorm(C, max_length=2, momentum=1.0) for _ in range(2)]
    parts = [torch.randn(n, C) for n in (5, 9)]
    for layer, x in zip(layers, parts, strict=True):
        for step in range(2):
            layer(x + step, step=step)
    merged, _ = kn.merge_statistics([layer.state_dict() for layer in layers], [5, 9])
    torch.testing.assert_close(merged["running_mean"][1], torch.cat(parts).mean(0) + 1)
    torch.testing.assert_close(merged["running_var"][0], torch.cat(parts).var(0))
    assert merged["num_batches_tracked"].tolist() == [2, 2]


def test_equal_entries_stay_as_they_are_infinities_too():
    mask = torch.full((2, 2), -torch.inf).triu(1)
    states = [{"mask": mask.clone(), "extra": "v1", "w": torch.tensor([0.1])} for _ in range(3)]
    merged, report = kn.merge_statistics(states, [1, 1, 1])
    assert torch.equal(merged["mask"], mask)
    assert merged["extra"] == "v1"
    assert torch.equal(merged["w"], states[0]["w"])
    assert not report.rows


def test_what_the_dtype_can_not_hold_is_an_error():
    """Each client's statistics fit into float16; the pooled variance does not."""
    states = [client(torch.randn(8, C) + shift, dtype=torch.float16) for shift in (-400, 400)]
    with pytest.raises(ValueError, match=r"'running_var' has values that are too large for torch\.float16"):
        kn.merge_statistics(states, [8, 8])


def test_dtypes_of_the_first_are_kept():
    low, high = client(torch.randn(8, C), dtype=torch.bfloat16), client(torch.randn(8, C), dtype=torch.float64)
    merged, _ = kn.merge_statistics([low, high], [8, 8])
    assert merged["running_var"].dtype == merged["weight"].dtype == torch.bfloat16
    merged, _ = kn.merge_statistics([high, low], [8, 8])
    assert merged["running_var"].dtype == merged["weight"].dtype == torch.float64


def changed(key, value):
    state = model(0).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("second", "counts", "error", "words"),
    [
        (changed("1.running_var", None), [4, 4], ValueError, "client 1 lacks '1.running_var'"),
        (changed("more", torch.zeros(1)), [4, 4], ValueError, "client 1 alone has 'more'"),
        (changed("1.weight", torch.zeros(9)), [4, 4], ValueError, "'1.weight'.*client 1 has.*(9,)"),
        (changed("steps", torch.tensor([8])), [4, 4], ValueError, r"'steps'.*clients \[1\]"),
        (changed("steps", torch.tensor([7.0])), [4, 4], ValueError, "'steps'.*kind"),
        (
            changed("1.running_mean", torch.tensor([0, torch.nan, 0])),
            [4, 4],
            ValueError,
            "'1.running_mean' of client 1",
        ),
        (changed("4.running_var", -torch.ones(4)), [4, 4], ValueError, "'4.running_var' of client 1 has 4"),
        ("no dict", [4, 4], TypeError, "client 1 must be a state_dict"),
        (changed("steps", torch.tensor([7])), [4], ValueError, "each of the 2 clients"),
        (changed("steps", torch.tensor([7])), 4, ValueError, "each of the 2 clients"),
        (changed("steps", torch.tensor([7])), [4, 0], ValueError, "client 1 must be finite and positive"),
        (changed("steps", torch.tensor([7])), [-1, 4], ValueError, "client 0 must be finite and positive"),
        (changed("steps", torch.tensor([7])), [4, 0.5], ValueError, "client 1.*at least 1"),
        (changed("steps", torch.tensor([7])), [4, torch.inf], ValueError, "client 1 must be finite"),
        (changed("steps", torch.tensor([7])), [4, [4]], ValueError, "each of the 2 batch norms; got 1"),
        (changed("steps", torch.tensor([7])), [4, "many"], TypeError, "client 1 must be numbers"),
        (changed("steps", torch.tensor([7])), [4, None], TypeError, "client 1 must be numbers"),
    ],
)
def test_errors_name_the_key_and_the_client(second, counts, error, words):
    with pytest.raises(error, match=words):
        kn.merge_statistics([model(0).state_dict(), second], counts)


def test_no_client_one_value_and_whitening():
    with pytest.raises(ValueError, match="at least one client"):
        kn.merge_statistics([], [])
    with pytest.raises(ValueError, match="more than one value"):
        kn.merge_statistics([model(0).state_dict()], [1])
    with pytest.raises(ValueError, match=r"running_cov.*local=True"):
        kn.merge_statistics([kn.WhiteningBatchNorm(4).state_dict()], [5])


def test_rows_that_a_client_never_used_count_nothing():
    """Each client has seen one domain; the third row, which no client has seen, stays."""
    torch.manual_seed(0)
    data = [torch.randn(400, 3, dtype=torch.float64) * 2 + 10, torch.randn(400, 3, dtype=torch.float64) - 4]
    layers = [kn.DomainBatchNorm(3, 3, momentum=1.0, dtype=torch.float64) for _ in data]
    for domain, (layer, x) in enumerate(zip(layers, data, strict=True)):
        layer(x, domain=domain)
    merged, report = kn.merge_statistics([layer.state_dict() for layer in layers], [400, 400])
    for domain, x in enumerate(data):
        torch.testing.assert_close(merged["running_mean"][domain], x.mean(0))
        torch.testing.assert_close(merged["running_var"][domain], x.var(0))
    assert merged["running_mean"][2].tolist() == [0.0] * 3
    assert merged["running_var"][2].tolist() == [1.0] * 3
    assert merged["num_batches_tracked"].tolist() == [1, 1, 0]
    assert report.rows[0]["spread"] == pytest.approx(0, abs=1e-6)
