"""The commands on published architectures: what is counted, what is right, what is printed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from support.bench_results import invoke
from torch import nn

from benchmarks import folding
from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo import zoo_run
from benchmarks.zoo.fusible_patterns import count_patterns
from benchmarks.zoo.zoo_check import ZooCheck
from benchmarks.zoo.zoo_run import ZooReport, ZooRow
from benchmarks.zoo.zoo_table import page, print_zoo
from keelnorm.measure.machine import describe

CHECK = ZooCheck(
    batch_norms=4, fusible=4, fused=3, foldable=2, folded=3, same_state=True,
    converted_error=2e-13, rounding=1e-13, folded_error=1e-15,
    left=["mean reads its result"],
)  # fmt: skip


class Net(nn.Module):
    """Four batch norms: one before ReLU, two that are added, one that is read twice; three behind convolutions."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x):
        y = F.relu(self.bns[0](self.convs[0](x)))
        y = self.bns[1](self.convs[1](y)) + self.bns[2](self.convs[2](y))
        z = self.bns[3](y)
        return F.relu(z) * z.mean()


def test_patterns_are_counted():
    assert count_patterns(Net().eval(), torch.randn(2, 3, 4, 4)) == (2, 3)


def test_what_is_right():
    assert ZooRow("a", "b", CHECK).is_right
    assert ZooRow("a", "b", replace(CHECK, converted_error=1e-9, rounding=2e-10)).is_right
    assert not ZooRow("a", "b", replace(CHECK, converted_error=1e-9)).is_right
    assert not ZooRow("a", "b", replace(CHECK, folded_error=1e-9)).is_right
    assert not ZooRow("a", "b", replace(CHECK, same_state=False)).is_right
    assert not ZooRow("a", "b").is_right
    assert not ZooRow("a", "b", CHECK, error="x").is_right


def a_report():
    rows = [ZooRow("Net-1", "pytorchcv", CHECK, 1.25, 1.5, 1.125), ZooRow("Net-2", "monai", error="KeyError: 3")]
    return ZooReport(describe(), 4, 7, rows, 1.0)


def test_table_and_page():
    console = Console(width=200, record=True)
    print_zoo(a_report(), console)
    said = console.export_text()
    assert "3 / 4" in said
    assert "Net-2: KeyError: 3" in said
    assert "1 of 2 architectures are right. Of 4 fusible calls 3 are fused (75.0 %)" in said
    text = page(a_report())
    assert "| Net-1 | pytorchcv | 4 | 3 / 4 | 3 / 2 | 2e-13 | 1e-15 | 1.25 | 1.50 | 1.12 |" in text
    assert "- Net-1: mean reads its result" in text


@pytest.mark.filterwarnings("ignore")
def test_the_command(tmp_path, monkeypatch):
    pytest.importorskip("pytorchcv")
    pytest.importorskip("transformers")
    pytest.importorskip("monai")
    out, made = tmp_path / "new" / "models.json", tmp_path / "models.md"
    words = ["--model", "conformer", "--rounds", "1", "--batch", "2", "--out", str(out), "--page", str(made)]
    done = invoke(zoo.main, *words)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["check"]["fused"] == row["check"]["fusible"] == 4
    assert row["training"] > 0
    assert "Wav2Vec2-Conformer" in made.read_text()
    monkeypatch.setattr(zoo_run, "check_architecture", lambda one, samples: replace(CHECK, folded_error=1.0))
    done = invoke(zoo.main, "--model", "conformer", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["rows"][0]["training"] is None  # a wrong one is not timed
    assert invoke(zoo.main, "--model", "nothing like it").exit_code == 2


@pytest.mark.filterwarnings("ignore")
def test_the_folding_command():
    pytest.importorskip("pytorchcv")
    words = ["--network", "ShuffleNetV2", "--batch", "1", "--rounds", "1", "--eager"]
    done = invoke(folding.main, *words)
    assert done.exit_code == 0, done.output
    assert "torch.nn.utils.fusion" in done.stdout
