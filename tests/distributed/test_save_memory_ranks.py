"""Recomputed outputs on two ranks, alone, under DistributedDataParallel and under FSDP2."""

from __future__ import annotations

import pytest
import torch
from processes import Scenarios
from saving import WRAPPERS


@pytest.mark.parametrize("name", WRAPPERS)
def test_steps_have_the_same_bits(name: str, ranks: Scenarios) -> None:
    for found in ranks("saving"):
        without, saving = found[name]
        assert len(without["tensors"]) == len(saving["tensors"]) > 20
        for a, b in zip(saving["tensors"], without["tensors"], strict=True):
            assert torch.equal(a, b)
        assert saving["kernels"] > without["kernels"], "nothing was recomputed"


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "synchronized" in name])
def test_recomputing_asks_no_other_rank(name: str, ranks: Scenarios) -> None:
    for found in ranks("saving"):
        without, saving = found[name]
        assert saving["collectives"] == without["collectives"]
        assert "all_reduce" in without["collectives"]
