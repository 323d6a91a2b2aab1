"""Scenarios of ranks that differ, die or do not come, with preflight and without."""

from __future__ import annotations

import importlib
import os
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from problems import C
from rank_models import Network, said
from torch import nn

import keelnorm as kn
import keelnorm.distributed
import keelnorm.engine.preflight
from keelnorm.distributed import preflight
from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm


def flights() -> Any:
    """With preflight: rank 1 of three goes another way."""
    rank = dist.get_rank()
    odd = rank == 1
    preflight(True)
    x = torch.randn(4, 4, dtype=torch.float64)
    found: dict[str, Any] = {}

    model = Network()
    found["agreed"] = said(lambda: model(x).sum().backward())
    found["order"] = said(lambda: Network()(x, swapped=odd))
    model = Network()
    model.bn2.train(not odd)
    found["mode"] = said(lambda: model(x))
    found["dtype"] = said(lambda: Network(torch.float32 if odd else torch.float64)(x.float() if odd else x))
    found["channels"] = said(lambda: SyncBatchNorm(3 if odd else 4)(torch.randn(5, 3 if odd else 4)))
    found["input"] = said(lambda: SyncBatchNorm(4)(torch.randn(5, 3 if odd else 4)))
    found["gradient"] = said(lambda: SyncBatchNorm(4)(torch.randn(5, 4, requires_grad=odd)))

    # The forwards agree, then one rank goes back through another branch first.
    bn, bn2 = Network().bn, SyncBatchNorm(3, dtype=torch.float64)
    a = torch.randn(4, C, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    outputs = [bn(a).sum(), bn2(b).sum()]
    found["backward"] = said(outputs[1 if odd else 0].backward)

    with torch.no_grad():  # one rank's evaluation is its own affair
        found["evaluation"] = said(lambda: Network().eval()(x)) if rank == 0 else ("", "")
    found["still working"] = said(lambda: Network()(x).sum().backward())
    preflight(False)
    found["off"] = said(lambda: SyncBatchNorm(4)(torch.randn(5, 4, dtype=torch.float32 if odd else torch.float64)))
    return found


def unlike() -> Any:
    """Without preflight: rank 1 of three has more channels, or fewer."""
    rank = dist.get_rank()
    odd = rank == 1
    preflight(False)
    found: dict[str, Any] = {}
    for name, channels in (("more", 4 + odd), ("fewer", 4 - odd), ("many", 4 + 4000 * odd)):
        layer, x = SyncBatchNorm(channels), torch.randn(5, channels, requires_grad=True)
        found[name] = said(partial(layer, x))
        found[f"{name}, unchanged"] = int(layer.num_batches_tracked), float(layer.running_mean.abs().max())
        found[f"{name}, activated"] = said(partial(nn.Sequential(layer), x.detach()))
        found[f"{name}, moments"] = said(kn.functional.moments(x.detach()).all_reduce)
        model = kn.BatchNorm1d(channels)
        found[f"{name}, recalibrated"] = said(partial(kn.recalibrate, model, [x.detach()]))
    bn, bn2 = SyncBatchNorm(4), SyncBatchNorm(3)
    outputs = [bn(torch.randn(5, 4, requires_grad=True)).sum(), bn2(torch.randn(5, 3, requires_grad=True)).sum()]
    found["backward"] = said(outputs[odd].backward)
    alike = SyncBatchNorm(4)
    found["still working"] = said(lambda: alike(torch.randn(5, 4, requires_grad=True)).sum().backward())
    return found


def dying() -> Any:
    """Rank 1 dies between its forward and its backward."""
    layer = SyncBatchNorm(3)
    y = layer(torch.randn(4, 3, requires_grad=True))
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    return said(y.sum().backward), said(lambda: nn.Sequential(layer)(torch.randn(4, 3))), time.monotonic() - start


def silent() -> Any:
    """Rank 1 lives, but does not come."""
    layer = nn.Sequential(SyncBatchNorm(3))
    if dist.get_rank() == 1:
        time.sleep(3)
        return None
    start = time.monotonic()
    return said(lambda: layer(torch.randn(4, 3))), time.monotonic() - start


def environment() -> Any:
    """Whether preflight is on, by what the environment says when keelnorm is imported."""
    found = {}
    for value in (None, "0", "1"):
        os.environ.pop("KEELNORM_SYNC_DEBUG", None)
        if value is not None:
            os.environ["KEELNORM_SYNC_DEBUG"] = value
        importlib.reload(keelnorm.engine.preflight)
        found[value] = keelnorm.distributed.preflight_is_on()
    return found
