"""`keelnorm convert`, run like a user's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from surgery.commands.invoke import refused, report_of, same
from torch import nn

import keelnorm as kn
from keelnorm.cli._shared.inspection import run_twice


def test_convert_reports_and_writes_the_same_state(model: nn.Module) -> None:
    torch.save(model.state_dict(), "w.pt")
    report = report_of("convert", "nets:small", "--weights", "w.pt", "--out", "out.safetensors", "--report", "r.json")
    assert report["summary"] == {"batch norms": 2, "converted": 2, "fused": 0, "left with a reason": 0}
    assert same(load_file("out.safetensors"), model.state_dict())
    assert json.loads(Path("r.json").read_text(encoding="utf-8")) == report
    assert report["notes"] == [
        "What batch norms run with is known once the model has run: give --input or --example.",
        "The state_dict was written to out.safetensors.",
    ]


@pytest.mark.parametrize("samples", [1, 2])
def test_convert_runs_the_model_on_an_example(model: nn.Module, samples: int) -> None:
    torch.save(model.state_dict(), "w.pt")
    words = ("convert", "nets:small", "--weights", "w.pt", "--input", f"{samples},3,8,8", "--out", "out.safetensors")
    report = report_of(*words)
    assert report["summary"] == {"batch norms": 2, "converted": 2, "fused": 2, "left with a reason": 0}
    assert [row["runs with"] for row in report["rows"]] == ["relu", "addition and relu"]
    assert report["notes"] == ["The state_dict was written to out.safetensors."]
    assert same(load_file("out.safetensors"), model.state_dict())  # as before the run
    np.save("x.npy", np.zeros((samples, 3, 8, 8)))
    again = report_of(*words[:4], "--example", "x.npy", "--no-fuse")
    assert (again["summary"]["fused"], again["notes"]) == (0, [])


def test_convert_of_a_model_that_runs_in_evaluation_alone() -> None:
    report = report_of("convert", "nets:linear", "--input", "1,3")
    assert [row["reason"] for row in report["rows"]] == ["its result leaves the model"]
    [note] = report["notes"]
    assert note.startswith("The model was run in evaluation alone; in training it raised ValueError: BatchNorm1d '1':")
    assert "RuntimeError: " in refused("convert", "nets:linear", "--input", "1,5")
    assert refused("convert", "nets:linear", "--input", "1,x").startswith("--input must be sizes")


def test_a_run_leaves_the_model_as_it_was(model: nn.Module) -> None:
    model.train()[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    kn.convert(model)
    assert run_twice(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))) == []
    assert same(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_convert_takes_its_options() -> None:
    assert report_of("convert", "nets:small", "--no-fuse")["summary"]["fused"] == 0
    rows = report_of("convert", "nets:small", "--sync", "--where", "3")["rows"]
    assert [(row["path"], row["is"]) for row in rows] == [("3.bn", "kn.SyncBatchNorm")]
