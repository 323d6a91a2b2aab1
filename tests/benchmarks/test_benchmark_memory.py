"""The parts of the memory benchmark on a tiny network: no number for a wrong result."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_network import CHANNELS, ONE, QUICK, SIDE, TINY, Tiny, Unit, job_of
from torch import nn

from benchmarks.memory import job_worker, memory_run
from benchmarks.memory.checkpointed_blocks import blocks_of, checkpointed, fewest
from benchmarks.memory.interleaved_steps import choose_batch
from benchmarks.memory.job_process import JobError, TooLargeError, run_job
from benchmarks.memory.kept_bytes import saved_bytes
from benchmarks.memory.largest_batch import largest_batch
from benchmarks.memory.memory_results import (
    CHECKPOINTED,
    CONVERTED,
    EAGER,
    PARTS,
    SAVED,
    MemoryReport,
)
from benchmarks.memory.memory_run import missing, run_memory
from benchmarks.memory.memory_targets import mean_bytes
from benchmarks.memory.same_results import check_bits
from keelnorm.bench.correctness import WrongResultError
from keelnorm.bench.peers import CannotError
from keelnorm.measure.machine import describe

# ---- the parts


def test_all_parts_of_a_tiny_network(tiny, monkeypatch):
    peaks = {EAGER: 3, SAVED: 1}  # GiB a sample
    right = job_worker.TASKS["train"]

    def train(job):
        found = right(job | {"batch": 2})
        return found | {"peaks": [job["batch"] * peaks[job["arm"]] << 30]} if job["steps"] == 2 else found

    monkeypatch.setitem(job_worker.TASKS, "train", train)
    report, stored = MemoryReport(describe(), QUICK, "code"), []
    run_memory(report, ["Tiny"], PARTS, store=lambda found: stored.append(found.to_json()), progress=False)
    [row] = report.rows
    assert not row.errors
    assert row.is_right
    assert not missing(row, PARTS)
    # Eager keeps what each convolution and each ReLU returns. The first is what a batch norm needs; the others can be
    # computed from it, and the last of them nothing reads but ReLU itself.
    small = 4 * (CHANNELS * 2 * 3 + CHANNELS * 2) * 4
    assert 6 * ONE <= row.bytes_kept.kept[EAGER] <= 6 * ONE + small
    assert 3 * ONE <= row.bytes_kept.kept[SAVED] <= 3 * ONE + small
    assert row.bytes_kept.ratio(SAVED) == pytest.approx(0.5, abs=0.01)
    assert row.bytes_kept.disagreement < 0.02
    assert row.step[0].pages == "fresh"
    assert all(one.ratio > 0 and set(one.samples_ms) == {CONVERTED, SAVED} for one in row.step)
    assert row.checkpoint.blocks == 3
    assert row.checkpoint.kept[CHECKPOINTED] <= 1.05 * row.checkpoint.kept[SAVED]
    assert set(row.checkpoint.steps[0].samples_ms) == {SAVED, CHECKPOINTED}
    assert {arm: len(steps) for arm, steps in row.peak.above.items()} == dict.fromkeys((EAGER, CONVERTED, SAVED), 3)
    assert row.largest.batch == {EAGER: 2, SAVED: 8}
    assert row.largest.ratio == 4
    assert [job["tasks"] for job in tiny[:2]] == [["check", "bytes", "step"], ["checkpoint"]]
    assert len(stored) == 4  # after each part
    assert MemoryReport.from_json(stored[-1]) == report


def test_a_wrong_recipe_gets_no_number(tiny, wrong_recipes):
    with pytest.raises(WrongResultError, match="differs with save_memory"):
        check_bits(TINY)
    report = MemoryReport(describe(), QUICK, "code")
    run_memory(report, ["Tiny"], PARTS, progress=False)
    [row] = report.rows
    assert list(row.errors) == ["check"]
    assert "the gradient of" in row.errors["check"]
    assert not any(row.has(part) for part in PARTS)
    assert len(tiny) == 1
    assert report.failed
    assert mean_bytes(report) is None


def test_what_training_leaves_is_compared_too(tiny, monkeypatch):
    """At the batch whose peak is measured, of which the check knows nothing."""
    right = job_worker.TASKS["train"]

    def train(job):
        return right(job) | {"digest": job["arm"]}

    monkeypatch.setitem(job_worker.TASKS, "train", train)
    report = MemoryReport(describe(), QUICK, "code")
    run_memory(report, ["Tiny"], ["peak"], progress=False)
    assert "parameters or buffers differ" in report.rows[0].errors["peak"]
    assert report.rows[0].peak is None


def test_an_error_costs_its_part_alone(tiny, monkeypatch):
    def fail(job):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(job_worker.TASKS, "bytes", fail)
    report = MemoryReport(describe(), QUICK, "code")
    run_memory(report, ["Tiny"], ["bytes", "step", "peak"], progress=False)
    [row] = report.rows
    assert row.errors == {"bytes": "RuntimeError: out of luck"}
    assert row.step
    assert row.peak
    monkeypatch.undo()
    assert missing(row, ["bytes", "step"]) == ["bytes"]


def test_too_little_free_memory_is_said_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setattr(memory_run, "available_bytes", lambda: 2 << 30)
    report = MemoryReport(describe(), QUICK, "code")
    run_memory(report, ["Tiny"], ["largest"], progress=False)
    assert "need 9.0 GiB of free memory, and 2.0 are free" in report.rows[0].errors["largest"]
    assert [job["tasks"] for job in tiny] == [["check"]]
    monkeypatch.setattr(memory_run, "available_bytes", lambda: None)
    run_memory(report, ["Tiny"], ["largest"], progress=False)
    assert "does not tell" in report.rows[0].errors["largest"]


# ---- checkpointing


def test_blocks_are_what_is_called_in_sequence():
    class Parallel(nn.Sequential):
        def forward(self, x):
            return sum(child(x) for child in self)

    block = Parallel(Unit(), Unit())
    model = nn.ModuleDict({"stages": nn.Sequential(Unit(3), nn.Sequential(block, nn.ReLU(), block)), "last": Unit()})
    assert blocks_of(model) == [model["stages"][0], block]


def test_checkpointed_blocks_keep_their_input_and_run_again():
    model, x = Tiny().train(), torch.randn(2, 3, SIDE, SIDE)
    blocks = blocks_of(model)
    kept = []
    for count in range(4):
        with checkpointed(blocks[:count]):
            kept.append(saved_bytes(model, x) / ONE)
    assert kept == pytest.approx([6, 5, 4, 2], abs=0.01)  # the first keeps the images, which are not counted
    assert all("forward" not in vars(block) for block in blocks)
    runs = []
    for block in blocks:
        block.conv.register_forward_hook(lambda *_: runs.append(1))
    with checkpointed(blocks[:2]):
        model(x).sum().backward()
    assert len(runs) == 2 + 2 + 1


@pytest.mark.parametrize(("limit", "count"), [(100, 0), (99, 1), (61, 4), (60, 4), (50, 5)])
def test_the_fewest_blocks(limit, count):
    assert fewest(lambda count: 100 - 10 * count, 5, limit) == count


def test_blocks_that_do_not_suffice():
    with pytest.raises(CannotError, match="with all 5 blocks"):
        fewest(lambda count: 100 - 10 * count, 5, 49)


# ---- the largest batch, and the batch of a step


@pytest.mark.parametrize("peak", [lambda n: 100 + 7 * n, lambda n: 100 + 7 * n + n**1.5, lambda n: 900 - 700 / n])
@pytest.mark.parametrize("limit", [100, 110, 200, 500, 899])
def test_the_largest_batch_fits_and_the_next_one_does_not(peak, limit):
    tried = []

    def peak_of(batch):
        tried.append(batch)
        return int(peak(batch)) if peak(batch) <= limit else None

    batch, peaks = largest_batch(peak_of, limit)
    assert batch == max([n for n in range(5000) if n == 0 or peak(n) <= limit])
    assert batch + 1 in tried
    assert all(peaks[n] <= limit for n in peaks)
    assert len(tried) == len(set(tried)) <= 20  # twice the halvings of the range


def test_few_runs_are_needed_where_peaks_are_linear():
    tried = []

    def peak_of(batch):
        tried.append(batch)
        return 400 + 81 * batch  # above the limit too: what a run says counts as what stops it

    assert largest_batch(peak_of, 4096)[0] == 45
    assert len(tried) <= 4


@pytest.mark.parametrize(("each", "batch"), [(1.0, 2), (0.175, 2), (0.05, 7), (1e-5, 64)])
def test_the_batch_of_a_step(each, batch):
    assert choose_batch(lambda samples: samples * each, target=0.35) == batch


# ---- processes


def test_a_process_trains():
    pytest.importorskip("pytorchcv")
    job = {"network": "MobileNetV2", "tasks": ["train"], "threads": 1, "arm": SAVED, "batch": 2, "size": 32, "steps": 1}
    found = run_job(job, limit=8 << 30)["train"]["value"]
    assert found["peaks"][0] >= found["before"] > 50 << 20
    assert len(found["digest"]) == 64


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell a process's own peak")
def test_a_process_that_takes_too_much_is_ended():
    with pytest.raises(TooLargeError, match=r"more than 0\.03 GiB"):
        run_job(job_of("train"), limit=32 << 20)  # python and torch alone take more


def test_a_process_says_why_it_ends():
    with pytest.raises(JobError, match="KeyError: 'nothing like it'"):
        run_job(job_of("nothing like it"))
