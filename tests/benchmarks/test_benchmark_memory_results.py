"""Results of the memory benchmark: runs that go on, targets, tables, the page, and the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support import browser
from support.bench_results import invoke
from tiny_network import QUICK, SIDE, TINY, Tiny, a_report

import keelnorm as kn
from benchmarks import architectures
from benchmarks.architectures import ARCHITECTURES
from benchmarks.memory import __main__ as command
from benchmarks.memory import job_worker, memory_run, memory_store
from benchmarks.memory.memory_markdown import page as markdown_page
from benchmarks.memory.memory_page import memory_document
from benchmarks.memory.memory_results import (
    NETWORKS_OF,
    MemoryReport,
    MemoryRow,
    Settings,
)
from benchmarks.memory.memory_run import run_memory
from benchmarks.memory.memory_store import new_report, stored_report
from benchmarks.memory.memory_table import print_memory
from benchmarks.memory.memory_targets import mean_bytes, mean_of, targets
from keelnorm.measure.machine import describe
from keelnorm.measure.page.html import write_page


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
