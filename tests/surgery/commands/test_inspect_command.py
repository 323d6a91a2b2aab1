"""`keelnorm inspect`, run like a user's."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from surgery.commands.invoke import refused, report_of, run
from torch import nn

import keelnorm as kn


def test_inspect_says_what_the_model_says(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([0.0, -1e-9])
        model[3].bn.running_var[0] = float("inf")
    kn.freeze(model, where="1")
    save_file(model.state_dict(), "w.safetensors")
    report = report_of("inspect", "nets:small", "--weights", "w.safetensors", "--input", "2,3,8,8")
    first, second = report["rows"]
    assert report["summary"] == {
        "batch norms": 2, "channels": 12, "dead channels": 2, "fusible": 2, "foldable": 1,
    }  # fmt: skip
    assert (first["path"], first["kind"], first["channels"], first["eps"]) == ("1", "BatchNorm2d", 6, 1e-5)
    assert (first["mode"], first["moments"], first["batches"], first["dead"]) == ("train", "finite", 0, 2)
    assert first["running var"] == [float(model[1].running_var.min()), float(model[1].running_var.max())]
    assert first["|weight|"] == [0.0, float(model[1].weight.max())]
    assert (first["comes after"], first["goes to"]) == ("Conv2d '0'", "ReLU '2'")
    assert (first["fuses with"], first["folds into"]) == ("relu", "0")
    assert second["moments"] == "not finite"
    assert second["running var"][1] is None  # JSON has no infinity
    assert (second["goes to"], second["folds into"]) == ("add", None)


def test_inspect_memory(folder: Path) -> None:
    (folder / "memory_hungry.py").write_text(
        "from torch import nn\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))\n",
        encoding="utf-8",
    )
    words = ("inspect", "memory_hungry:net", "--input", "8,3,64,64", "--memory")
    report = json.loads(run(*words, "--limit", "1", "--json").stdout)
    rows = {row["path"]: row for row in report["rows"]}
    one = 8 * 8 * 64 * 64 * 4 / 1e6
    assert rows["1"]["kept MB"] == pytest.approx(one, abs=2e-3)
    assert report["summary"]["kept MB"] == pytest.approx(3 * one, abs=4e-3)
    assert report["summary"]["converted"] == pytest.approx(2 * one, abs=4e-3)
    assert report["summary"]["with save_memory"] == pytest.approx(one, abs=4e-3)
    assert re.fullmatch(r"\d+ / \d+ / \d+", report["summary"]["largest batch"])
    assert "inspect --memory: kept MB" in run(*words).stdout
    assert "--memory runs the model; give an example by --input or --example" in refused(*words[:2], "--memory")


def test_inspect_without_a_run_and_of_frozen_and_lazy_layers(folder: Path) -> None:
    (folder / "more.py").write_text(
        "import keelnorm as kn, torch\nfrom torch import nn\n"
        "model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, affine=False),\n"
        "    kn.BatchNorm1d(2, track_running_stats=False))\n"
        "kn.freeze(model, where='0')\n",
        encoding="utf-8",
    )
    rows = report_of("inspect", "more:model")["rows"]
    assert [row["fuses with"] for row in rows] == [None] * 4
    assert [row["mode"] for row in rows] == ["frozen", "train", "train", "train"]
    assert [row["moments"] for row in rows] == ["finite", "not there yet", "finite", "none"]
    assert [row["channels"] for row in rows] == [3, None, 2, 2]
    assert [row["dead"] for row in rows] == [0, None, None, 0]
    assert rows[3]["kind"] == "kn.BatchNorm1d"
    assert [row["path"] for row in report_of("inspect", "more:model", "--where", "2")["rows"]] == ["2"]


def test_the_table_has_what_is_the_same_once() -> None:
    printed = run("inspect", "nets:small", "--input", "2,3,8,8").stdout
    assert printed.startswith("inspect: batch norms 2, channels 12, dead channels 0, fusible 2, foldable 2\n")
    assert re.search(r"^3\.bn +6 .*Conv2d '3.conv' +add .*addition and relu +3.conv$", printed, re.MULTILINE)
    assert "All of them: kind BatchNorm2d, eps 1e-05, momentum 0.1, mode train, moments finite, batches 0." in printed


def test_what_the_page_shows_is_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "command_line.md").read_text(encoding="utf-8")
    (folder / "models.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if not Path(one, "models.py").exists()])  # other tests'
    shown = page.split("```console\n$ keelnorm ")[1].split("```")[0].split("$ keelnorm ")
    assert len(shown) == 3
    for command, _, output in (one.partition("\n") for one in shown):
        pattern = ".*".join(map(re.escape, output.strip().split("...")))
        assert re.fullmatch(pattern, run(*shlex.split(command)).stdout.strip()), command
