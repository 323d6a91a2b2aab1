"""The GPU's benchmark, tried on the CPU: rows, ratios, wrong results without a number, and time that is up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import keelnorm as kn
from benchmarks.gpu import gpu_check, gpu_network, gpu_run, gpu_sync
from benchmarks.gpu.gpu_timing import Loop, by_turns
from keelnorm.bench.cases import Case, Shape, least_bytes
from keelnorm.bench.peers import PEERS, Built, Peer
from keelnorm.bench.results import Report
from keelnorm.engine.kernels import triton

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "benchmarks.gpu"]
CASE = Case(Shape("small", (6, 5, 4, 4)), "channels_last", "bn_add_relu")


def test_every_peer_has_a_row_for_each_mode_with_ratios_of_the_same_rounds():
    names = ("keelnorm", "eager", "native", "relu", "copy")
    rows = {(row.peer, row.mode): row for row in gpu_run.run_case(CASE, names, device="cpu", rounds=3)}
    both = {(name, mode) for name in names[:-1] for mode in gpu_run.MODES}
    assert set(rows) == both | {("copy", "forward")}
    for row in rows.values():
        assert row.error is None
        assert len(row.samples_us) == 3
        assert row.median_us == pytest.approx(sorted(row.samples_us)[1], rel=1e-3, abs=1e-3)
    own, eager = rows["keelnorm", "both"], rows["eager", "both"]
    assert own.ratios["eager"] == pytest.approx(
        sorted(a / b for a, b in zip(own.samples_us, eager.samples_us, strict=True))[1], rel=1e-2
    )
    assert own.least_bytes == least_bytes(6 * 5 * 16, 4, "bn_add_relu", "both")
    assert own.error_eps is not None
    assert own.copy_fraction > 0
    assert "eager ×" in gpu_run.line(CASE, list(rows.values()))


def test_a_wrong_result_gets_no_number(monkeypatch):
    def wrong(problem):
        right = PEERS["eager"].build(problem)
        return Built(lambda x, residual: right.call(x, residual) * 1.01, right.norm)

    monkeypatch.setitem(gpu_run.GPU_PEERS, "native", gpu_run.GpuPeer(Peer("native", "wrong", wrong)))
    rows = gpu_run.run_case(CASE, ("eager", "native"), device="cpu", rounds=2)
    said = {row.mode: row for row in rows if row.peer == "native"}
    assert set(said) == set(gpu_run.MODES)
    for row in said.values():
        assert "WrongResultError" in row.error
        assert row.median_us is None
        assert not row.samples_us
    assert all("native" not in row.ratios for row in rows)
    assert "native: WrongResultError" in gpu_run.line(CASE, rows)


def test_what_the_time_did_not_suffice_for_is_said():
    said: list[str] = []
    rows = gpu_run.run_cases(
        [CASE, CASE], ("eager",), device="cpu", rounds=2, until=time.monotonic() - 1, say=said.append
    )
    assert rows == []
    assert said == ["not measured because the time was up: 2 cases with eager"]


def test_loops_take_turns():
    order: list[str] = []
    loops = {name: Loop(partial(lambda name, _: order.append(name), name), 1, "cpu") for name in ("a", "b")}
    order.clear()
    assert {name: len(times) for name, times in by_turns(loops, 2).items()} == {"a": 2, "b": 2}
    assert order == ["a", "b", "b", "a"]


def test_the_check_compares_every_dtype_layout_and_variant():
    said: list[str] = []
    found = gpu_check.check_all("cpu", said.append, ((4, 3, 2, 2), (5, 7)))
    assert (found.right, found.wrong) == (3 * 3 * 3, [])
    assert set(found.worst) == set(gpu_check.DTYPES)
    assert said[0] == "27 cases right, 0 wrong"


@pytest.mark.slow
def test_a_network_is_compared_with_eager_before_it_is_timed(monkeypatch):
    rows = gpu_network.run_network("ResNet-50", 4, 64, "cpu", 1, ("eager", "keelnorm"))
    assert [(row.error, len(row.samples_ms)) for row in rows] == [(None, 1), (None, 1)]
    assert rows[1].ratios[rows[1].eager_arm] == pytest.approx(rows[1].samples_ms[0] / rows[0].samples_ms[0], rel=1e-3)


def test_a_loss_is_held_against_those_of_roundings_of_the_images():
    right = [2.30, 2.25, 2.35]
    assert gpu_network.disagreement([2.16, 9.9], right) is None
    assert gpu_network.disagreement([2.44, 2.2], right) is None
    said = "the first losses are 2.9000, 2.2000; eager's first is 2.2500 to 2.3500 for roundings of the images"
    assert gpu_network.disagreement([2.9, 2.2], right) == said
    assert gpu_network.disagreement([2.0, 2.2], right) is not None
    assert gpu_network.disagreement([2.305], [2.3, 2.3]) is None  # a rounding of the loss
    assert gpu_network.disagreement([2.33], [2.3, 2.3]) is not None
    for losses in ([2.3, float("nan")], [float("nan"), 2.3], [float("inf")]):
        assert re.search("nan|inf", gpu_network.disagreement(losses, right))


def test_synchronized_layers_on_one_process():
    said: list[str] = []
    ours, theirs = gpu_sync.run_sync("cpu", 2, said.append, (4, 3, 2, 2))
    assert ours.error is None
    assert len(ours.samples_us) == 2
    assert "GPU" in theirs.skipped  # torch's own runs on GPUs alone
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.skipif(triton.missing() is not None, reason=f"{triton.missing()}")
def test_the_program_writes_a_report_that_the_page_draws(tmp_path):
    out = tmp_path / "gpu.json"
    asked = ["--device", "cpu", "--rounds", "2", "--seconds", "0", "--network", "none", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([*PROGRAM, *asked], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "kernels triton" in run.stdout
    assert "0 wrong" in run.stdout
    assert "not measured because the time was up" in run.stdout
    report = Report.from_json(out.read_text())
    assert report.machine.gpu == "interpreter"
    assert [row.suite for row in report.rows] == ["sync", "sync"]


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run(PROGRAM, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert "torch finds no GPU here; --device cpu with TRITON_INTERPRET=1" in run.stderr
    assert kn.kernels.active("cuda") in ("triton", "reference")
