"""A tiny network that has all parts of the memory benchmark, and a report of its results."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.memory import interleaved_steps, job_worker, memory_run
from benchmarks.memory.memory_results import (
    CHECKPOINTED,
    CONVERTED,
    EAGER,
    NETWORKS_OF,
    SAVED,
    Checkpointing,
    KeptBytes,
    Largest,
    MemoryReport,
    MemoryRow,
    Peaks,
    Settings,
    StepTimes,
)
from keelnorm.engine.output_recipes import Recipe
from keelnorm.measure.machine import describe

SIDE, CHANNELS = 80, 8
#: An output of a unit at batch 2: large enough to wait for the operation that follows, as in a user's run.
ONE = 2 * CHANNELS * SIDE * SIDE * 4
QUICK = Settings(seconds=0.0, rounds=1, peak_samples=2, limit_bytes=8 << 30, size=SIDE)


class Unit(nn.Module):
    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(channels, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Unit(3), nn.Sequential(Unit(), Unit()))
        self.output = nn.Linear(CHANNELS, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.features(x).mean((2, 3)))


TINY = Architecture("Tiny", "torch", Tiny, (3, SIDE, SIDE))


@pytest.fixture
def tiny(monkeypatch):
    """One network that has all parts, measured in this process."""
    monkeypatch.setitem(ARCHITECTURES, "Tiny", TINY)
    for part in ("checkpoint", "peak", "largest"):
        monkeypatch.setitem(NETWORKS_OF, part, ("Tiny",))
    monkeypatch.setattr(interleaved_steps, "MOST_SAMPLES", 2)
    monkeypatch.setattr(memory_run, "available_bytes", lambda: 64 << 30)
    jobs = []

    def run(job, *, limit=None):
        jobs.append(job)
        return job_worker.answer(json.loads(json.dumps(job)))

    monkeypatch.setattr(memory_run, "run_job", run)
    return jobs


def job_of(*tasks, **given):
    return {"network": "Tiny", "tasks": tasks, "threads": None, "samples": 2, "seconds": 0.0, "rounds": 1, **given}


@pytest.fixture
def wrong_recipes(monkeypatch):
    """Outputs that are recomputed are off by a rounding error."""
    right = Recipe._compute

    def compute(self):
        y = right(self)
        return torch.nextafter(y, torch.full_like(y, 9.0))

    monkeypatch.setattr(Recipe, "_compute", compute)


def kept(eager=100, converted=70, saved=40):
    by_arm = {EAGER: eager << 20, CONVERTED: converted << 20, SAVED: saved << 20}
    return KeptBytes(2, by_arm, dict(by_arm))


def steps(other=CONVERTED, ratio=1.05, lost=0.0):
    return [StepTimes(pages, 4, ratio, lost, {SAVED: [2.1], other: [2.0]}) for pages in ("fresh", "reused")]


def a_report():
    rows = [
        MemoryRow(
            "MobileNetV2",
            "pytorchcv",
            is_right=True,
            bytes_kept=kept(),
            step=steps(),
            checkpoint=Checkpointing(19, 6, 4, {SAVED: 100, CHECKPOINTED: 101}, steps(CHECKPOINTED, 0.8)),
            peak=Peaks(32, dict.fromkeys((EAGER, CONVERTED, SAVED), 1), {
                EAGER: [90 << 20, 100 << 20], CONVERTED: [95 << 20, 80 << 20],
                SAVED: [55 << 20, 57 << 20],
            }),
            largest=Largest(4 << 30, {EAGER: 20, SAVED: 35}, {EAGER: {"20": 3 << 30}, SAVED: {"35": 3 << 30}}),
        ),
        MemoryRow(
            "ResNet-50", "pytorchcv", is_right=True, bytes_kept=kept(200, 200, 170), step=steps(ratio=1.25, lost=0.1)
        ),
    ]  # fmt: skip
    return MemoryReport(describe(), Settings(), "code", rows, 12.0)
