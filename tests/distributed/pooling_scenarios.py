"""Scenarios of running statistics and moments that are pooled over ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from rank_models import said
from torch import nn

import keelnorm as kn
import keelnorm.distributed
import keelnorm.engine.preflight
from keelnorm.distributed import sync_statistics


def pooling() -> Any:
    """Ordinary batch norms of three ranks; see test_pooling."""
    rank = dist.get_rank()
    model = pooled_model(rank)
    found: dict[str, Any] = {}
    default = copy.deepcopy(model)
    sync_statistics(default)
    found["default"] = default.state_dict()
    repeated = copy.deepcopy(default)
    sync_statistics(repeated)
    found["repeated"] = repeated.state_dict()
    given = copy.deepcopy(model)
    sync_statistics(given, count=(0.1, 0.5, 0.0)[rank])
    found["given"] = given.state_dict()
    pair = dist.new_group([0, 1])
    inside = copy.deepcopy(model)
    found["pair"] = said(lambda: sync_statistics(inside, pair)), inside.state_dict()
    poisoned = copy.deepcopy(model)
    if rank == 1:
        poisoned.bn.running_var[0] = torch.nan
    sync_statistics(poisoned)
    found["poisoned"] = poisoned.state_dict()
    fresh = nn.BatchNorm1d(2)
    sync_statistics(fresh)
    found["untrained"] = fresh.state_dict()
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    if rank == 2:
        other.more = nn.BatchNorm1d(2)
    found["other model"] = said(lambda: sync_statistics(other))
    found["other channels"] = said(lambda: sync_statistics(nn.BatchNorm1d(2 + (rank == 1))))
    found["other counts"] = said(lambda: sync_statistics(model, count=1.0 if rank == 2 else None))
    found["illegal count"] = said(lambda: sync_statistics(model, count=-1.0 if rank == 2 else 1.0))
    found["unchanged"] = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    found["no layers"] = said(lambda: sync_statistics(nn.Linear(2, 2)))
    sync_statistics(nn.BatchNorm1d(2, track_running_stats=False))
    return found


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.deep = nn.Sequential(kn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(2, track_running_stats=False))


def pooled_model(rank: int) -> Pooled:
    """Rank r's model after r + 1 batches, one of its layers after 2 only on rank 1."""
    torch.manual_seed(rank)
    model = Pooled()
    for _ in range(rank + 1):
        model.bn(torch.randn(6, 3, 2, 2) * (1 + rank) + 5 * rank)
    for _ in range(2 if rank == 1 else 0):
        model.deep[0](torch.randn(6, 4) - 2)
    return model


def moments() -> Any:
    rank = dist.get_rank()
    data = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e6
    data += torch.arange(20).view(-1, 1, 1) // 7
    own = data[:7] if rank == 0 else data[7:] if rank == 1 else data[:0]
    total = kn.Moments.from_tensor(own).all_reduce()
    per_channel = kn.Moments.from_tensor(
        own, torch.ones(len(own), dtype=torch.bool) if rank == 1 else None
    ).all_reduce()
    alone = kn.Moments.empty(3) if rank else kn.Moments.from_tensor(data)
    alone = alone.all_reduce()
    nothing = kn.Moments.empty(2).all_reduce()
    half = kn.BatchNorm1d(2).half()
    half.running_mean.copy_(torch.tensor([400.0, 1.0]) * (rank - 1))
    half.num_batches_tracked.fill_(1)
    kn.sync_statistics(half)
    weights = None if rank == 1 else torch.arange(1.0, len(own) + 1) / 100  # some ranks have weights, others none
    weighted = kn.Moments.from_tensor(own, sample_weight=weights, weighting="importance").all_reduce()
    differentiable = kn.Moments.from_tensor(own.clone().requires_grad_())
    return {
        "total": total,
        "per channel": per_channel,
        "alone": alone,
        "nothing": nothing,
        "weighted": weighted,
        "half": half.state_dict(),
        "gradient": said(differentiable.all_reduce),
    }
