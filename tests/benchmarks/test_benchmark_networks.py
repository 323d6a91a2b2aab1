"""Networks: the same results with keelnorm's layers, turns taken, peaks of the arm's own process."""

import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from support.bench_results import settings_of

import keelnorm as kn
from benchmarks.conversion import convert_and_learn
from benchmarks.networks import agreement as agreement_module
from benchmarks.networks import arm_process, network_run
from benchmarks.networks.agreement import agreement, judge
from benchmarks.networks.network_run import run_networks
from keelnorm.bench.correctness import WrongResultError
from keelnorm.engine.fusion import pending

pytest.importorskip("pytorchcv")


def settings():
    return settings_of([], layouts=["contiguous"], modes=["training", "inference"], threads=1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_small_network_agrees(layout):
    before = pending.completed
    assert agreement("MobileNetV2", batch=2, size=64, layout=layout) <= 10
    assert pending.completed - before >= 2 * 46  # its fusible calls ran fused, in training and in inference


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_layer_that_is_wrong_is_found_in_the_small_network(monkeypatch, layout):
    """However much room the roundings leave: here eps of one layer is another."""

    right = convert_and_learn

    def wrong(net, x):
        found, report = right(net, x)
        [*_, last] = [module for module in found.modules() if isinstance(module, kn.BatchNorm2d)]
        last.eps = 0.1
        return found, report

    monkeypatch.setattr(agreement_module, "convert_and_learn", wrong)
    with pytest.raises(WrongResultError, match="is off by"):
        agreement("MobileNetV2", batch=2, size=64, layout=layout)


def test_a_wrong_network_is_found():
    with pytest.raises(WrongResultError, match="b is off"):
        judge({"a": 1e-7, "b": 1e-3}, [{"a": 1e-7, "b": 1e-6}])
    with pytest.raises(WrongResultError, match="a is off by nan"):
        judge({"a": float("nan"), "b": 1e-7}, [{"a": 1e-7, "b": 1e-7}])
    with pytest.raises(WrongResultError, match=r"the median tensor by 0\.0001"):  # off everywhere, if not by much
        judge(dict.fromkeys("abc", 1e-4), [{"a": 1e-6, "b": 1e-6, "c": 1e-2}])
    assert judge({"a": 2e-6}, [{"a": 1e-6}]) == pytest.approx(2)
    gate = {"a": 1e-6, "b": 5e-3, "c": 1e-6}  # one that falls the other way moves one tensor, here another
    assert judge({"a": 6e-3, "b": 1e-6, "c": 1e-6}, [gate, gate]) == pytest.approx(1.2)


class FakeWorker:
    """Takes as long as its arm's name is, and one byte more at each step."""

    log: ClassVar[list[str]] = []

    def __init__(self, config):
        self.name, self.baseline_bytes, self.peak = config["layers"], 1, 1

    def step(self, mode):
        self.log.append(f"{mode} {self.name}")
        self.peak += 1
        return len(self.name) / 1000, self.peak

    def close(self):
        self.log.append(f"close {self.name}")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(arm_process, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    return FakeWorker


def run(settings, **given):
    return run_networks(settings, ["MobileNetV2"], 32, progress=False, **given)


def test_arms_take_turns_and_inference_is_first(fake):
    report = run(settings(), check=lambda *_, **__: 1.0)
    steps = network_run.WARM_UP + 2
    assert fake.log[:4] == ["inference eager", "inference keelnorm", "inference keelnorm", "inference eager"]
    assert fake.log[2 * steps].startswith("training")
    assert fake.log[-2:] == ["close keelnorm", "close eager"]
    row = next(one for one in report.networks if one.layers == "keelnorm" and one.mode == "training")
    assert row.ratios == {"eager contiguous fresh": pytest.approx(8 / 5)}
    assert len(row.samples_ms) == 2
    assert not report.failed


def test_a_wrong_network_is_not_timed(fake):
    def wrong(*_, **__):
        raise WrongResultError("output is off")

    report = run(settings(), check=wrong)
    assert report.failed
    for row in report.networks:
        assert (row.step_ms is None) == (row.layers == "keelnorm")
        assert bool(row.error) == (row.layers == "keelnorm")
    assert not any("keelnorm" in line for line in fake.log)


def test_an_arm_that_ends_costs_its_own_rows(fake, monkeypatch):
    def step(self, mode):
        if self.name == "keelnorm":
            raise arm_process.ArmError("out of memory")
        return 0.001, 1

    monkeypatch.setattr(FakeWorker, "step", step)
    report = run(settings(), check=lambda *_, **__: 1.0)
    assert {row.layers: bool(row.error) for row in report.networks} == {"keelnorm": True, "eager": False}


def test_a_real_process_says_why_it_ends():
    config = {"network": "absent", "batch": 1, "size": 32, "threads": 1}
    with arm_process.workers([arm_process.Arm("eager", "contiguous", "fresh")], config) as found:
        (reason,) = found.values()
    assert "KeyError" in str(reason)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell a process's own peak")
def test_the_peak_is_not_the_parents():
    held = torch.ones(150 << 20)  # 600 MB, more than a process with torch takes
    code = "import torch; from keelnorm.measure.disturbance import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < held.nbytes
