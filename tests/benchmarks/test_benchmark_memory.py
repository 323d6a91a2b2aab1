"""The memory benchmark: every part on a tiny network, no number for a wrong result, runs that go on, and the page."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import browser
from support.bench_results import invoke
from torch import nn

import keelnorm as kn
from benchmarks import architectures
from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.memory import __main__ as command
from benchmarks.memory import interleaved_steps, job_worker, memory_run, memory_store
from benchmarks.memory.checkpointed_blocks import blocks_of, checkpointed, fewest
from benchmarks.memory.interleaved_steps import choose_batch
from benchmarks.memory.job_process import JobError, TooLargeError, run_job
from benchmarks.memory.kept_bytes import saved_bytes
from benchmarks.memory.largest_batch import largest_batch
from benchmarks.memory.memory_markdown import page as markdown_page
from benchmarks.memory.memory_page import memory_document
from benchmarks.memory.memory_results import (
    CHECKPOINTED,
    CONVERTED,
    EAGER,
    NETWORKS_OF,
    PARTS,
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
from benchmarks.memory.memory_run import missing, run_memory
from benchmarks.memory.memory_store import new_report, stored_report
from benchmarks.memory.memory_table import print_memory
from benchmarks.memory.memory_targets import mean_bytes, mean_of, targets
from benchmarks.memory.same_results import check_bits
from keelnorm.bench.correctness import WrongResultError
from keelnorm.bench.peers import CannotError
from keelnorm.engine.output_recipes import Recipe
from keelnorm.measure.machine import describe
from keelnorm.measure.page.html import write_page

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


# ---- stored results


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


def test_a_stopped_run_goes_on(tiny, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "Other", replace(TINY, name="Other"))
    report = MemoryReport(describe(), QUICK, "code")

    def stop(job, *, limit=None):
        if job["network"] == "Other":
            raise KeyboardInterrupt
        return job_worker.answer(job)

    texts = []
    with monkeypatch.context() as inner:
        inner.setattr(memory_run, "run_job", stop)
        with pytest.raises(KeyboardInterrupt):
            run_memory(report, ["Tiny", "Other"], ["bytes"], store=lambda r: texts.append(r.to_json()), progress=False)
    found = MemoryReport.from_json(texts[-1])
    before = found.row("Tiny")
    tiny.clear()
    run_memory(found, ["Tiny", "Other"], ["bytes"], progress=False)
    assert [job["network"] for job in tiny] == ["Other"]
    assert found.row("Tiny") is before
    assert found.row("Other").bytes_kept.kept == before.bytes_kept.kept


def test_what_a_run_goes_on_with(tmp_path, monkeypatch):
    path, fresh = tmp_path / "memory.json", new_report(QUICK)
    assert stored_report(path, fresh) == (fresh, [])
    before = replace(fresh, rows=[MemoryRow("Tiny", "torch")])
    path.write_text(before.to_json())
    fresh.machine.load_average = 99.0
    found, unlike = stored_report(path, fresh)
    assert (found.rows, unlike) == (before.rows, [])
    assert stored_report(path, replace(fresh, code="other")) == (replace(fresh, code="other"), ["code"])
    fresh.machine.torch = "1.0"
    assert stored_report(path, fresh) == (fresh, ["torch"])
    fresh.machine.torch = found.machine.torch
    with pytest.raises(ValueError, match=r"measured with seconds 0\.0, not 5\.0"):
        stored_report(path, replace(fresh, settings=replace(QUICK, seconds=5.0)))
    path.write_text("{}")
    with pytest.raises(ValueError, match="memory benchmark"):
        stored_report(path, fresh)


def test_the_digest_leaves_out_what_only_reads():
    folder = Path(memory_store.__file__).parent
    names = {path.name for path in folder.glob("*.py")}
    assert set(memory_store.READING) <= names
    for name in names - set(memory_store.READING):
        text = (folder / name).read_text(encoding="utf-8")
        assert not re.search(r"import .*(memory_markdown|memory_page|memory_store|memory_table|memory_targets)", text)


# ---- tables and pages


def test_targets():
    found = {one.what: one for one in targets(a_report())}
    assert found["bytes / eager, mean of 2"].value == pytest.approx((0.4 * 0.85) ** 0.5)
    assert found["bytes / eager, mean of 2"].is_met
    assert not found["bytes / eager, ResNet-50"].is_met
    assert found["bytes / eager, DenseNet-121"].is_met is None
    assert found["peak / eager, MobileNetV2"].value == pytest.approx(0.57)
    assert found["largest batch / eager, MobileNetV2"].is_met
    assert found["step / checkpointing, reused pages, MobileNetV2"].value == 0.8
    assert mean_of([2.0, 8.0]) == pytest.approx(4)
    assert mean_of([2.0, None]) is mean_of([]) is None


def test_a_mean_lacks_no_network():
    report = a_report()
    report.rows.append(MemoryRow("VGG-16 with BN", "pytorchcv", errors={"check": "y differs"}))
    assert mean_bytes(report) is None
    report.rows[-1] = MemoryRow("VGG-16 with BN", "pytorchcv", is_right=True)  # whose bytes nobody asked for
    assert mean_bytes(report) is not None


def test_tables_and_the_markdown_page():
    report = a_report()
    report.rows.append(MemoryRow("VGG-16 with BN", "pytorchcv", errors={"check": "y differs with save_memory"}))
    console = Console(width=160, record=True)
    print_memory(report, console)
    said = console.export_text()
    assert "not measured: VGG-16 with BN, check: y differs with save_memory" in said
    assert "6 of 19" in said
    assert "not met" in said
    text = markdown_page(report)
    assert "| MobileNetV2 | pytorchcv | 104.9 | 0.70 | 0.40 | 1.05 | 1.05 |" in text
    assert "| ResNet-50 | pytorchcv | 209.7 | 1.00 | 0.85 | ~1.25 | ~1.25 |" in text
    assert "| geometric mean of 3 |" in text
    assert "| MobileNetV2 | 20 | 35 | ×1.75 |" in text
    assert "- VGG-16 with BN, check: y differs" in text
    assert "within" not in markdown_page(replace(report, rows=report.rows[1:2]))  # no section without rows


@pytest.mark.skipif(browser.EXECUTABLE is None, reason=browser.MISSING)
def test_a_browser_draws_the_page_without_a_complaint(tmp_path):
    path = tmp_path / "page.html"
    write_page(memory_document(a_report()), path, template="bench.html")
    with browser.opened() as view:
        for width, theme in ((1200, "light"), (390, "dark")):
            view.open(path, width, theme)
            drawn = view.evaluate(
                "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.point').length)"
            )
            assert drawn == [4, 4, 3, 2, 2]
            assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.problems == []


# ---- the command


def test_the_command(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "Settings", lambda *given: replace(Settings(*given), size=SIDE))
    out, html, made = (tmp_path / name for name in ("new/memory.json", "page.html", "page.md"))
    words = ["--model", "tiny", "--part", "bytes,step", "--seconds", "0", "--rounds", "1", "--out", str(out)]
    done = invoke(command.main, *words, "--html", str(html), "--page", str(made))
    assert done.exit_code == 0, done.output
    assert len(tiny) == 1
    report = MemoryReport.from_json(out.read_text())
    assert report.rows[0].bytes_kept.samples == 2
    assert "| Tiny | torch |" in made.read_text()
    assert "What is kept for the backward?" in html.read_text()
    assert invoke(command.main, *words).exit_code == 0
    assert len(tiny) == 1  # nothing is measured twice
    done = invoke(command.main, *words, "--batch", "4")
    assert done.exit_code == 2
    assert "measured with samples 2, not 4" in " ".join(done.output.replace("│", " ").split())
    assert MemoryReport.from_json(out.read_text()) == report
    done = invoke(command.main, *words, "--batch", "4", "--again")
    assert done.exit_code == 0
    assert MemoryReport.from_json(out.read_text()).rows[0].bytes_kept.samples == 4
    done = invoke(command.main, "--from", str(out), "--json")
    assert json.loads(done.stdout)["rows"][0]["name"] == "Tiny"
    assert len(tiny) == 2
    assert invoke(command.main, "--model", "nothing like it").exit_code == 2
    assert invoke(command.main, "--from", str(html)).exit_code == 2


def test_the_command_times_nothing_with_no_rounds_and_fails_for_a_wrong_network(tiny, wrong_recipes):
    done = invoke(command.main, "--model", "tiny", "--part", "step", "--rounds", "0")
    assert done.exit_code == 0, done.output
    assert tiny == []
    done = invoke(command.main, "--model", "tiny", "--part", "bytes", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["rows"][0]["bytes_kept"] is None


def test_every_network_of_a_part_is_an_architecture_with_a_step_of_training():
    names = {name for networks in NETWORKS_OF.values() for name in networks}
    assert all(architectures.ARCHITECTURES[name].package == "pytorchcv" for name in names)
    assert isinstance(kn.save_memory(Tiny()), kn.save_memory)
