import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import evenkeel
from evenkeel import cli

runner = CliRunner()


def said(result):
    """What was printed, without the frame that wraps it."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


def test_quick_demo_end_to_end(tmp_path):
    page = tmp_path / "demo.html"
    command = [sys.executable, "-m", "evenkeel.cli", "demo", "--quick", "--seeds", "2", "--json", "--out", str(page)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["files"] == {"page": str(page), "results": str(tmp_path / "demo.jsonl")}
    assert document["run"]["failed"] == 0
    assert document["plan"] == {"seeds": 2, "quick": True}
    assert len(document["sections"]) == 5
    for section in document["sections"]:
        assert not section["answer"].startswith("No answer")
        assert section["title"] in page.read_text()
    steps = document["sections"][-1]
    assert all(measure["values"]["evenkeel"]["value"] > 0 for measure in steps["measures"])

    again = runner.invoke(cli.app, command[3:])
    repeated = json.loads(again.stdout)
    assert repeated["run"]["reused"] == repeated["run"]["cells"]
    assert repeated["sections"] == document["sections"]


def test_one_experiment_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, ["demo", "--quick", "--seeds", "2", "--only", "hidden_moments", "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "Does batch normalization hold a hidden layer's input still?" in result.stdout
    assert "page: evenkeel-demo.html" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evenkeel-demo.html", "evenkeel-demo.jsonl"]


def test_a_failing_cell_ends_with_an_error_and_a_page(tmp_path, monkeypatch):
    from evenkeel.lab.experiments import hidden_moments

    def fails(**axes):
        raise RuntimeError("made to fail")

    monkeypatch.setattr(hidden_moments, "moments", fails)
    page = tmp_path / "demo.html"
    options = ["--quick", "--seeds", "2", "--only", "hidden_moments", "--jobs", "1", "--out", str(page)]
    result = runner.invoke(cli.app, ["demo", *options])
    assert result.exit_code == 1
    assert "12 of 12 cells failed" in result.stderr
    assert "RuntimeError: made to fail" in result.stdout
    assert "No answer" in page.read_text()


def test_being_stopped_says_how_to_go_on(tmp_path, monkeypatch):
    from evenkeel.lab import demo

    def stopped(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stopped)
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path / "demo.html")])
    assert result.exit_code == 130
    assert "the same command goes on" in said(result)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--seeds", "1"], "2"),
        (["--seeds", "many"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--only", "speed"], "no experiment is named 'speed'; there are convergence, learning_rate"),
        (["--out", "page.pdf"], "has to end in .html"),
        (["--out", "."], "is a directory"),
        (["--out", "file/page.html"], "nothing can be written"),
        (["--colour"], "--colour"),
    ],
)
def test_options_are_checked_before_anything_runs(options, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = runner.invoke(cli.app, ["demo", *options])
    assert result.exit_code == 2
    assert answer in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    found = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "plotly" else found(name))
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert "this command needs plotly" in said(result)
    assert "pip install 'evenkeel[lab]'" in said(result)


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import evenkeel.cli"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip() == "the evenkeel command needs the package typer: pip install 'evenkeel[cli]'"


def test_version_and_help():
    assert runner.invoke(cli.app, ["--version"]).stdout == f"evenkeel {evenkeel.__version__}\n"
    shown = said(runner.invoke(cli.app, ["--help"]))
    assert "demo" in shown
    for option in ("--out", "--seeds", "--quick", "--only", "--jobs", "--fresh", "--json"):
        assert option in said(runner.invoke(cli.app, ["demo", "--help"]))


def test_help_imports_nothing_heavy_of_its_own():
    code = (
        "import sys, evenkeel; before = set(sys.modules); import evenkeel.cli; "
        "print([name for name in ('sklearn', 'joblib', 'plotly', 'scipy', 'jinja2', 'evenkeel.lab') "
        "if name in set(sys.modules) - before])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
