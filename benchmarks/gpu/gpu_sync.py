"""Synchronized batch normalization on one process: keelnorm's layer against torch's."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

import keelnorm as kn
from benchmarks.gpu.gpu_timing import Loop, by_turns
from keelnorm.bench.results import Row
from keelnorm.measure.timing import median_ratio, spread

DIMS = (64, 256, 28, 28)
LAYERS: dict[str, Callable[[int], nn.Module]] = {"keelnorm": kn.SyncBatchNorm, "eager": nn.SyncBatchNorm}


@contextmanager
def one_process(device: str) -> Iterator[None]:
    """Inside, there is a process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{os.path.join(folder, 'store')}"
        dist.init_process_group("nccl" if device == "cuda" else "gloo", where, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def run_sync(device: str, rounds: int, say: Callable[[str], None], dims: tuple[int, ...] = DIMS) -> list[Row]:
    """Time forward and backward of both layers; torch's layer runs on GPUs only."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(dims, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    shape = "x".join(map(str, dims))
    rows, loops, results = [], {}, {}
    with one_process(device):
        for name, make in LAYERS.items():
            row = Row("sync", shape, "channels_last", "bn", "both", name, dtype=str(dtype).removeprefix("torch."))
            rows.append(row)
            try:
                layer = make(dims[1]).to(device)

                def step(_: int, layer: nn.Module = layer) -> None:
                    torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

                results[name] = torch.autograd.grad(layer(x), x, dy)[0]
                loops[name] = Loop(step, 4, device)
            except (ValueError, RuntimeError) as error:
                row.skipped = str(error).partition("\n")[0]
        times = by_turns(loops, rounds)
    for row in rows:
        if row.peer in times:
            row.samples_us = times[row.peer]
            row.median_us, row.spread = statistics.median(row.samples_us), spread(row.samples_us)
            row.ratios = {
                other: median_ratio(row.samples_us, theirs) for other, theirs in times.items() if other != row.peer
            }
    if len(results) == 2 and not torch.allclose(results["keelnorm"].float(), results["eager"].float(), atol=0.05):
        rows[0].error, rows[0].median_us, rows[0].ratios = "dx differs from torch's", None, {}
    said = [row.error or row.skipped or f"{row.median_us:.0f} µs" for row in rows]
    say(f"synchronized, one process, {shape}: keelnorm {said[0]}; torch {said[1]}")
    return rows
