"""The command `keelnorm doctor`, run like a user's, on a module in the current directory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import keelnorm as kn
from keelnorm.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current directory, with the module `ailing` in it."""
    shutil.copy(Path(__file__).with_name("doctor_models.py"), tmp_path / "ailing.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ailing", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def run(*words, status=0):
    result = runner.invoke(app, ("doctor", *words))
    assert result.exit_code == status, result.output
    return result


def report_of(*words, status=0):
    return json.loads(run(*words, "--json", status=status).stdout)  # which is there alone


def found(report):
    return [(one["rule"], *one["layers"]) for one in report["findings"]]


def sick():
    import ailing  # type: ignore[import-not-found]

    return ailing.sick()


def test_it_reports_what_diagnose_finds():
    model = sick()
    example = (torch.zeros(2, 3, 8, 8),)
    printed = run("ailing:sick", "--input", "2,3,8,8").stdout
    assert printed.rstrip("\n") == str(kn.diagnose(model, example=example))
    assert report_of("ailing:sick", "--input", "2,3,8,8") == kn.diagnose(model, example=example).to_dict()
    assert "warning  KN103 momentum  1\n" in printed


def test_the_mode_can_be_set():
    assert found(report_of("ailing:sick")) == [("KN103", "1")]
    assert found(report_of("ailing:sick", "--eval")) == [("KN103", "1"), ("KN108", "1")]
    assert found(report_of("ailing:sick", "--train")) == [("KN103", "1")]


def test_rules_are_chosen_and_silenced():
    words = ("ailing:sick", "--eval")
    assert found(report_of(*words, "--select", "KN108", "--select", "KN101")) == [("KN108", "1")]
    assert found(report_of(*words, "--ignore", "KN103,KN101")) == [("KN108", "1")]
    assert found(report_of(*words, "--silence", "momentum:1")) == [("KN108", "1")]
    assert found(report_of(*words, "--where", "1")) == [("KN103", "1"), ("KN108", "1")]


@pytest.mark.parametrize(("severity", "status"), [("error", 0), ("warning", 3), ("info", 3), ("never", 0)])
def test_the_exit_status_is_by_severity(severity, status):
    run("ailing:sick", "--fail-on", severity, status=status)


def test_an_error_fails_by_default():
    run("ailing:sick", "--args", '{"momentum": 0.0}', status=3)
    run("ailing:sick", "--args", '{"momentum": 0.0}', "--fail-on", "never")
    run("ailing:sick", "--args", '{"momentum": 0.1}', "--fail-on", "info")


def test_a_baseline_is_written_and_read():
    run("ailing:sick", "--write-baseline", "base.json", "--fail-on", "warning", status=3)
    report = report_of("ailing:sick", "--baseline", "base.json", "--fail-on", "warning")
    assert (report["findings"], [one["rule"] for one in report["known"]]) == ([], ["KN103"])
    again = run("ailing:sick", "--baseline", "base.json", "--write-baseline", "base.json", "--eval").stdout
    assert "The findings were written to base.json." in again
    assert report_of("ailing:sick", "--baseline", "base.json", "--eval")["findings"] == []


def test_sarif_names_the_file_and_line_of_the_model():
    run("ailing:sick", "--sarif", "found.sarif")
    log = json.loads(Path("found.sarif").read_text(encoding="utf-8"))
    [result] = log["runs"][0]["results"]
    lines = Path("ailing.py").read_text(encoding="utf-8").splitlines()
    assert result["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "ailing.py"},
        "region": {"startLine": lines.index("def sick(momentum=0.99):") + 1},
    }


def test_data_shows_the_neighbors_and_recalibrates():
    state = sick().state_dict()
    state["1.running_var"][0] = float("nan")
    save_file(state, "w.safetensors")
    words = ("ailing:sick", "--weights", "w.safetensors", "--data", "ailing:batches", "--eval", "--select", "KN1")
    assert found(report_of(*words, status=3)) == [("KN109", "1"), ("KN103", "1")]
    report = report_of(*words, "--fix", "--out", "fixed.safetensors")
    assert [one["rule"] for one in report["fixed"]] == ["KN103", "KN109"]
    assert report["notes"] == ["The state_dict was written to fixed.safetensors."]
    fixed = load_file("fixed.safetensors")
    assert fixed["1.running_var"].isfinite().all()
    assert torch.equal(fixed["1.weight"], state["1.weight"])


def test_data_from_a_file():
    np.save("x.npy", np.random.default_rng(0).normal(size=(10, 3, 8, 8)))
    report = report_of("ailing:sick", "--data", "x.npy", "--batch-size", "4", "--max-batches", "2", "--select", "KN1")
    assert found(report) == [("KN103", "1")]
    assert "KN115" in report["rules"]


def test_several_inputs_and_what_a_model_prints():
    report = report_of("ailing:Pair", "--input", "3,4", "--input", "3,4")
    assert found(report) == [("KN101", "norm")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ailing:plain",), "diagnose: there is no batch norm in Linear"),
        (("ailing:sick", "--input", "2,7,8,8"), "diagnose: the model raised on the example: RuntimeError: "),
        (("ailing:Pair", "--input", "2,4"), "diagnose: the model raised on the example: TypeError: "),
        (("ailing:sick", "--select", "KN9"), "diagnose: select names 'KN9', which is no rule"),
        (("ailing:sick", "--silence", "KN9:1"), "diagnose: silence names 'KN9', which is no rule"),
        (("ailing:sick", "--baseline", "gone.json"), "diagnose: there is no baseline gone.json"),
        (("ailing:sick", "--fail-on", "bad"), "--fail-on must be one of error, warning, info, never; got 'bad'"),
        (("ailing:sick", "--fix"), "--fix and --out FILE go together"),
        (("ailing:sick", "--out", "x.safetensors"), "--fix and --out FILE go together"),
        (("ailing:gone",), "there is no 'gone' in ailing"),
    ],
)
def test_errors_take_one_line(words, says):
    result = run(*words, status=1)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line != "in the forward"]
    assert len(lines) == 1
    assert says in lines[0]


def test_files_that_can_not_be_written(folder):
    (folder / "taken").mkdir()
    for option in ("--sarif", "--write-baseline"):
        result = run("ailing:sick", option, "taken", status=2)
        assert "taken is a directory" in " ".join(result.stderr.replace("│", " ").split())


def test_a_training_step():
    words = ("ailing:sick", "--data", "ailing:labelled", "--select", "KN3", "--fail-on", "never")
    assert "KN305, KN306 (needs batches= and loss=)" in run(*words).stdout
    for loss in ("torch.nn:CrossEntropyLoss", "ailing:loss"):
        report = report_of(*words, "--loss", loss)
        assert report["rules"] == ["KN301", "KN302", "KN304", "KN305", "KN306"]
        assert not report["findings"]
    said = run(*words[:2], "ailing:batches", *words[3:], "--loss", "torch.nn:CrossEntropyLoss", status=1).stderr
    assert "needs batches of input and target" in said
    assert (
        "--loss: ailing:NOTHING must be a module, or a function"
        in run(*words, "--loss", "ailing:NOTHING", status=1).stderr
    )


def test_the_page(folder):
    run("ailing:sick", "--input", "2,3,8,8", "--page", "doctor.html")
    page = (folder / "doctor.html").read_text()
    assert "KN103 momentum" in page
    assert "model.get_submodule(&#39;1&#39;).momentum" in page
    for wrong in ("doctor.txt", "ailing.py/doctor.html", "."):
        run("ailing:sick", "--page", wrong, status=2)
