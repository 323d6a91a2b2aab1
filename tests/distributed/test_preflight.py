"""The preflight names the layer and the rank where the ranks part ways, on every rank."""

from __future__ import annotations

import pytest
from processes import Scenarios

#: What rank 1 does otherwise, and the words for it.
ODD = {
    "order": ("differ in layer at 'bn2' of rank 1 ", "rank 0: forward of 'bn'", "rank 1: forward of 'bn2'"),
    "mode": ("differ in mode at 'bn2' of rank 1 ", "rank 0: forward of 'bn2', 5 channels, float64, training"),
    "dtype": ("differ in dtype at 'bn' of rank 1 ", "float32", "float64"),
    "channels": ("differ in channels at a SyncBatchNorm of rank 1 ", "4 channels", "3 channels"),
    "input": ("differ in channels at a SyncBatchNorm of rank 1 ",),
    "gradient": ("differ in gradient at a SyncBatchNorm of rank 1 ", "without a gradient"),
    "backward": ("differ in channels at a SyncBatchNorm of rank 1 ", "backward of a SyncBatchNorm, 3 channels"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_rank_that_goes_another_way_is_named_on_all_ranks(what: str, ranks: Scenarios) -> None:
    for found in ranks("flights"):
        kind, words = found[what]
        assert kind == "RuntimeError", words
        for part in ODD[what]:
            assert part in words


def test_ranks_that_agree_are_let_through(ranks: Scenarios) -> None:
    for found in ranks("flights"):
        for what in ("agreed", "evaluation", "still working", "off"):
            assert found[what] == ("", "")


@pytest.mark.parametrize(("value", "on"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_turns_it_on(value: str | None, on: bool, ranks: Scenarios) -> None:
    assert [found[value] for found in ranks("environment")] == [on, on]


@pytest.mark.parametrize("what", ["more", "fewer", "many"])
def test_other_channels_are_said_on_all_ranks_without_a_preflight_too(what: str, ranks: Scenarios) -> None:
    channels = {"more": 5, "fewer": 3, "many": 4004}[what]
    for found in ranks("unlike"):
        for case in (what, f"{what}, activated"):
            kind, words = found[case]
            assert kind == "RuntimeError", words
            assert "the ranks differ in channels" in words
            assert " of rank 1 (rank 0: forward of " in words
            assert f", {channels} channels, float32, training, with" in words
        assert found[f"{what}, unchanged"] == (0, 0.0)
        for case, function in (("moments", "Moments.all_reduce"), ("recalibrated", "recalibrate")):
            kind, words = found[f"{what}, {case}"]
            assert kind == "RuntimeError", words
            assert words.startswith(f"{function}: the ranks differ in channels at ")
            assert "of rank 1 (rank 0: exchange of 4 channels, float64" in words


def test_other_backwards_are_said_on_all_ranks_without_a_preflight_too(ranks: Scenarios) -> None:
    for found in ranks("unlike"):
        kind, words = found["backward"]
        assert kind == "RuntimeError", words
        assert "the ranks differ in channels at a SyncBatchNorm of rank 1 (rank 0: backward of " in words
        assert found["still working"] == ("", "")
