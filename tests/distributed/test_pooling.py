"""Moments and running statistics over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pooling_scenarios import pooled_model
from processes import Scenarios
from torch import Tensor


def mixture(states: list[dict[str, Tensor]], layer: str, weights: list[float]) -> tuple[Tensor, Tensor]:
    """Mean and variance of what has the ranks' running statistics, in these proportions."""
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    means = torch.stack([state[f"{layer}.running_mean"].double() for state in states])
    squares = torch.stack([state[f"{layer}.running_var"].double() for state in states]) + means.square()
    mean = w @ means
    return mean, w @ squares - mean.square()


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    return [pooled_model(rank).state_dict() for rank in range(3)]


def assert_pooled(found: dict[str, Any], states: list[dict[str, Tensor]], layer: str, weights: list[float]) -> None:
    mean, var = mixture(states, layer, weights)
    torch.testing.assert_close(found[f"{layer}.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[f"{layer}.running_var"].double(), var, rtol=1e-5, atol=1e-6)


def same(states: list[dict[str, Tensor]]) -> bool:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return all(torch.equal(state[k], states[0][k]) for state in states for k in states[0] if k.endswith(buffers))


def test_running_statistics_are_pooled_by_their_batches(ranks: Scenarios, states: list[dict[str, Tensor]]) -> None:
    found = [part["default"] for part in ranks("pooling")]
    assert same(found)
    assert_pooled(found[0], states, "bn", [1, 2, 3])
    assert found[0]["bn.num_batches_tracked"] == 2
    assert_pooled(found[0], states, "deep.0", [0, 2, 0])
    assert found[0]["deep.0.num_batches_tracked"] == 1  # 2/3, rounded
    for rank, state in enumerate(found):
        assert torch.equal(state["bn.weight"], states[rank]["bn.weight"])


def test_pooling_again_changes_nothing(ranks: Scenarios) -> None:
    for part in ranks("pooling"):
        for name, value in part["default"].items():
            torch.testing.assert_close(part["repeated"][name], value, rtol=1e-6, atol=1e-7)


def test_running_statistics_are_pooled_by_given_counts(ranks: Scenarios, states: list[dict[str, Tensor]]) -> None:
    found = [part["given"] for part in ranks("pooling")]
    assert same(found)
    for layer in ("bn", "deep.0"):
        assert_pooled(found[0], states, layer, [0.1, 0.5, 0])


def test_a_process_group_pools_by_itself(ranks: Scenarios, states: list[dict[str, Tensor]]) -> None:
    *members, (words, outside) = [part["pair"] for part in ranks("pooling")]
    assert [words for words, _ in members] == [("", "")] * 2
    assert_pooled(members[0][1], states[:2], "bn", [1, 2])
    assert words[0] == "ValueError"
    assert "rank 2 is not in the process_group" in words[1]
    assert all(torch.equal(outside[name], value) for name, value in states[2].items())


def test_a_channel_that_is_not_finite_is_left_to_the_others(ranks: Scenarios, states: list[dict[str, Tensor]]) -> None:
    found = [part["poisoned"] for part in ranks("pooling")]
    assert same(found)
    mean, var = mixture(states, "bn", [1, 2, 3])
    mean_without, var_without = mixture(states, "bn", [1, 0, 3])
    mean[0], var[0] = mean_without[0], var_without[0]
    torch.testing.assert_close(found[0]["bn.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0]["bn.running_var"].double(), var, rtol=1e-5, atol=1e-6)


def test_what_no_rank_has_trained_stays(ranks: Scenarios) -> None:
    for part in ranks("pooling"):
        fresh = torch.nn.BatchNorm1d(2).state_dict()
        assert all(torch.equal(part["untrained"][name], value) for name, value in fresh.items())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other model", "the models differ at 'more': rank 0 has no batch normalization"),
        ("other channels", "the models differ at '': rank 0 has running statistics of shape (2,)"),
        ("other counts", "count is given on all ranks or on none; rank 0 has None, rank 2 1.0"),
        ("illegal count", "count must be a number from 0 on; got -1.0 (float) on rank 2"),
    ],
)
def test_what_does_not_fit_together_is_an_error_on_all_ranks(what: str, words: str, ranks: Scenarios) -> None:
    for part in ranks("pooling"):
        kind, came = part[what]
        assert kind == "RuntimeError"
        assert words in came
        assert part["unchanged"]


def test_a_model_without_batch_norms_is_an_error_on_all_ranks(ranks: Scenarios) -> None:
    words = "sync_statistics: there is no batch norm in Linear, so there is nothing to pool"
    assert [part["no layers"] for part in ranks("pooling")] == [("ValueError", words)] * 3


def test_moments_of_all_ranks(ranks: Scenarios) -> None:
    data = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e6
    data += torch.arange(20).view(-1, 1, 1) // 7
    mean = data.mean((0, 2))
    m2 = (data - mean[:, None]).square().sum((0, 2))
    found = ranks("moments")
    for part in found:
        for name in ("total", "per channel", "alone"):
            assert part[name].count.tolist() == [80] * 3
            torch.testing.assert_close(part[name].mean, mean, rtol=1e-15, atol=0)
            torch.testing.assert_close(part[name].m2, m2, rtol=1e-9, atol=0)
            for value in ("count", "mean", "m2"):
                assert torch.equal(getattr(part[name], value), getattr(found[0][name], value))
        assert part["nothing"].count.tolist() == [0, 0]
        assert (part["nothing"].m2 == 0).all()
        kind, words = part["gradient"]
        assert kind == "RuntimeError"
        assert "lose their gradient" in words


def test_weights_and_their_squares_add_up(ranks: Scenarios) -> None:
    """Also where some ranks have weights and others do not."""
    from keelnorm import Moments

    data = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e6
    data += torch.arange(20).view(-1, 1, 1) // 7
    weights = torch.cat([torch.arange(1.0, 8.0) / 100, torch.ones(13)])
    whole = Moments.from_tensor(data, sample_weight=weights, weighting="importance")
    for part in ranks("moments"):
        for name in ("count", "mean", "m2", "squares", "var_unbiased"):
            expected = getattr(whole, name).expand(3)
            torch.testing.assert_close(getattr(part["weighted"], name), expected, rtol=1e-8, atol=0, msg=name)
        assert torch.equal(part["total"].squares, part["total"].count)


def test_what_a_buffer_can_not_hold_stays(ranks: Scenarios) -> None:
    """The spread between the ranks' means, 400 apart, does not fit into float16."""
    for rank, part in enumerate(ranks("moments")):
        assert part["half"]["running_mean"].tolist() == [400 * (rank - 1), 0]
        torch.testing.assert_close(
            part["half"]["running_var"].double(), torch.tensor([1, 5 / 3]).double(), rtol=1e-3, atol=0
        )


def test_empty_parts_change_no_bit(ranks: Scenarios) -> None:
    from keelnorm import Moments

    data = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e6
    data += torch.arange(20).view(-1, 1, 1) // 7
    whole = Moments.from_tensor(data)
    for part in ranks("moments"):
        assert torch.equal(part["alone"].mean, whole.mean)
        assert torch.equal(part["alone"].m2, whole.m2)
