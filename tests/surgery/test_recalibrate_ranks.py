"""Recalibration in several processes, each with part of the data, equals one process with all of it."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import keelnorm as kn


def a_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3)).double()


def some_batches():
    torch.manual_seed(1)
    return [torch.randn(n, 4, dtype=torch.float64) for n in (5, 9, 2, 7, 4)]


def work(rank, store, sequential, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, report = kn.recalibrate(
        a_net(), some_batches()[:3] if rank == 0 else some_batches()[3:], sequential=sequential
    )
    torch.save((model.state_dict(), report.to_dict()), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("sequential", [False, True])
def test_two_ranks_of_uneven_parts(tmp_path, sequential):
    mp.start_processes(work, (str(tmp_path / "store"), sequential, str(tmp_path)), nprocs=2, start_method="spawn")
    alone, report = kn.recalibrate(a_net(), some_batches(), sequential=sequential)
    for rank in range(2):
        state, found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in alone.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
        assert [row["values"] for row in found["rows"]] == [row["values"] for row in report.rows]
