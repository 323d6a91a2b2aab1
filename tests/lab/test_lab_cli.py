import json
import re
import subprocess
import sys

import pytest
from fakes import fake_claim
from typer.testing import CliRunner

import keelnorm
from keelnorm import cli
from keelnorm.lab.core import claim as claim_module

runner = CliRunner()


def said(result):
    """What was printed, without the frame that wraps it."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A laboratory with one claim, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    made = fake_claim()
    monkeypatch.setattr(claim_module, "claims", lambda: {made.name: made})
    return made


def test_run_then_report_then_show(fake, tmp_path):
    ran = runner.invoke(cli.app, ["lab", "run", "--jobs", "1", "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["files"] == {"page": "keelnorm-lab.html", "results": "keelnorm-lab.jsonl"}
    assert document["plan"] == {"quick": True, "seeds": None, "data": []}
    assert document["run"]["failed"] == document["run"]["missing"] == 0
    assert document["sections"][0]["verdict"] == "holds"
    page = (tmp_path / "keelnorm-lab.html").read_text()

    again = runner.invoke(cli.app, ["lab", "run", "--jobs", "1", "--json"])
    assert json.loads(again.stdout) == document
    (tmp_path / "keelnorm-lab.html").unlink()
    reported = runner.invoke(cli.app, ["lab", "report", "--json"])
    assert json.loads(reported.stdout) == document
    assert (tmp_path / "keelnorm-lab.html").read_text() == page

    shown = runner.invoke(cli.app, ["lab", "show", "1"])
    assert "It is better. holds" in said(shown)
    assert "Somebody 2020" in said(shown)
    assert json.loads(runner.invoke(cli.app, ["lab", "show", "fakes", "--json"]).stdout) == document["sections"]


def test_full_has_more_seeds_and_seeds_override(fake):
    full = json.loads(runner.invoke(cli.app, ["lab", "run", "--full", "--jobs", "1", "--json"]).stdout)
    assert full["run"]["cells"] == 10
    assert full["command"] == "keelnorm lab run --full"
    own = json.loads(runner.invoke(cli.app, ["lab", "run", "fakes", "--seeds", "2", "--jobs", "1", "--json"]).stdout)
    assert own["run"]["cells"] == 4
    assert own["sections"][0]["command"] == "keelnorm lab run fakes --quick --seeds 2"
    # A report is on what the last run was asked for.
    assert json.loads(runner.invoke(cli.app, ["lab", "report", "--json"]).stdout)["run"]["cells"] == 4


def test_list(fake):
    assert "fakes" in runner.invoke(cli.app, ["lab", "list"]).stdout
    (row,) = json.loads(runner.invoke(cli.app, ["lab", "list", "--json"]).stdout)
    assert row == {"number": 1, "name": "fakes", "title": "A title", "statement": "It is better.", "data": ["digits"]}


def test_a_report_without_results_says_how_to_get_them(fake):
    for command in ("report", "show"):
        result = runner.invoke(cli.app, ["lab", command, "--out", "other.html"])
        assert result.exit_code == 1
        assert "other.jsonl has no results" in said(result)
        assert "keelnorm lab run --out other.html" in said(result)


def test_a_failing_cell_ends_with_an_error_and_a_page(fake, tmp_path, monkeypatch):
    def fails(*, arm, seed):
        raise RuntimeError("made to fail")

    import fakes

    monkeypatch.setattr(fakes, "accuracy", fails)
    result = runner.invoke(cli.app, ["lab", "run", "--jobs", "1"])
    assert result.exit_code == 1
    assert "6 of 6 cells failed" in result.stderr
    assert "RuntimeError: made to fail" in said(result)
    assert "No answer" in (tmp_path / "keelnorm-lab.html").read_text()


def test_being_stopped_says_how_to_go_on(fake, monkeypatch):
    from keelnorm.lab.core import laboratory

    def stopped(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(laboratory, "run_order", stopped)
    result = runner.invoke(cli.app, ["lab", "run"])
    assert result.exit_code == 130
    assert "the same command goes on" in said(result)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--seeds", "1"], "2"),
        (["--seeds", "many"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["speed"], "no claim is named 'speed'; there are 1 fakes"),
        (["--quick", "--full"], "choose one of --quick and --full"),
        (["--out", "page.pdf"], "must end in .html"),
        (["--out", "."], "is a directory"),
        (["--out", "file/page.html"], "nothing can be written"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--cluster", "localhost"], "tcp://host:8786"),
        (["--colour"], "--colour"),
    ],
)
def test_options_are_checked_before_anything_runs(options, answer, tmp_path, fake):
    (tmp_path / "file").write_text("")
    result = runner.invoke(cli.app, ["lab", "run", *options])
    assert result.exit_code == 2
    assert answer in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", [["demo"], ["lab", "run"], ["lab", "list"]])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, command):
    from keelnorm.engine import optional_imports

    found = optional_imports.find_spec
    monkeypatch.setattr(optional_imports, "find_spec", lambda name: None if name == "plotly" else found(name))
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 1
    assert "this command needs plotly" in said(result)
    assert re.search(r"pip install .*'plotly>=", said(result))


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import keelnorm.cli"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    said = r"the keelnorm command needs typer: .*pip install 'typer>=[\d.]+' 'rich>=\d+' 'safetensors>=[\d.]+'\n"
    assert re.fullmatch(said, ended.stderr)


def test_version_and_help():
    assert runner.invoke(cli.app, ["--version"]).stdout == f"keelnorm {keelnorm.__version__}\n"
    shown = said(runner.invoke(cli.app, ["--help"]))
    assert "demo" in shown
    assert "lab" in shown
    for option in ("--out", "--seeds", "--jobs", "--fresh", "--json"):
        assert option in said(runner.invoke(cli.app, ["demo", "--help"]))
    for option in ("--quick", "--full", "--seeds", "--data-dir", "--out", "--jobs", "--cluster", "--fresh", "--json"):
        assert option in said(runner.invoke(cli.app, ["lab", "run", "--help"]))


def test_help_imports_nothing_heavy_of_its_own():
    code = (
        "import sys, keelnorm; before = set(sys.modules); import keelnorm.cli; "
        "print([name for name in ('sklearn', 'joblib', 'plotly', 'scipy', 'jinja2', 'PIL', 'keelnorm.lab.claims') "
        "if name in set(sys.modules) - before])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
