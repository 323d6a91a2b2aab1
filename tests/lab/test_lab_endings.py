"""How a command ends when a stream, a file or the terminal is in its way."""

import io
import json
import os
import re
import sys

import pytest
from fakes import fake_claim
from support.fresh import Scenario, run_fresh
from typer.testing import CliRunner

from keelnorm import cli
from keelnorm.cli._shared import exit_status
from keelnorm.engine.atomic_write import write_text
from keelnorm.lab.core import claim as claim_module
from keelnorm.lab.core.store import Store
from keelnorm.measure.page import html

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


START = """
import io, os, sys
from keelnorm.cli import main
sys.argv = ["keelnorm", *{words}]
{before}
main()
"""
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {descriptor})"
ASCII = "sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w'), encoding='ascii')"


def test_streams_that_are_full_closed_or_know_few_characters():
    def started(before, *words):
        return Scenario(START.format(words=list(words), before=before))

    outcomes = run_fresh(
        {
            "full": started(FULL.format(descriptor=1), "info"),
            "full, of another command": started(
                FULL.format(descriptor=1), "inspect", "torch.nn:BatchNorm1d", "--args", '{"num_features": 3}'
            ),
            "both full": started(FULL.format(descriptor=1) + ";" + FULL.format(descriptor=2), "--version"),
            "closed": started("os.close(1)", "--version"),
            "nobody reads": started("r, w = os.pipe(); os.close(r); os.dup2(w, 1)", "--version"),
            "ascii": started(ASCII, "info"),
        }
    )
    # The process that is forked leaves by os._exit, so what is in errors is all that a user would see.
    assert outcomes["full"].errors.startswith("standard output: No space left on device\n")
    assert "SystemExit: 1" in outcomes["full"].errors
    [line] = outcomes["full, of another command"].errors.partition("\nTraceback")[0].splitlines()
    assert "No space left on device" in line
    assert outcomes["both full"].errors == ""
    assert outcomes["closed"].errors.startswith("standard output: Bad file descriptor\n")
    assert outcomes["nobody reads"].errors.startswith("Traceback")  # that of SystemExit: nothing is said
    assert "runs here" in outcomes["ascii"].output
    assert outcomes["ascii"].output.isascii()
    assert "SystemExit: 0" in outcomes["ascii"].errors


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "x2 <= 3 x 4 - 1 ... + x ? e ? [1.8, 3.5]\n"),
        ("latin-1", "x² <= 3 × 4 - 1 ... + x ? é ? [1.8, 3.5]\n"),
        ("utf-8", "x² ≤ 3 × 4 − 1 … ✓ ✗ ? é 漢 [1.8, 3.5]\n"),
    ],
)
def test_characters_that_the_terminal_lacks_are_replaced_by_like_ones(monkeypatch, encoding, expected):
    """Above all the signs of an outcome: a check mark that became a question mark would say "not resolved"."""
    there = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(there, encoding=encoding))
    with exit_status.ended_in_one_line():
        print("x² ≤ 3 × 4 − 1 … ✓ ✗ ? é 漢 [1.8, 3.5]")
    assert there.getvalue() == expected.encode(encoding)


def test_every_sign_of_an_outcome_has_a_substitute_of_its_own():
    from keelnorm.measure.page.terminal import SIGNS

    plain = [sign.encode("ascii", "keelnorm.substitute") for sign in SIGNS.values()]
    assert len(set(plain)) == len(SIGNS)


@pytest.mark.parametrize("name", ["keelnorm-lab.html", "keelnorm-lab.jsonl"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_place_where_nothing_can_be_written_is_said_before_anything_runs(fake, tmp_path, name, make):
    make(tmp_path / name)
    for command in ("run", "report"):
        result = runner.invoke(cli.app, ["lab", command])
        assert result.exit_code == 2
        assert re.search(r"is a directory|is no ordinary file, but a pipe or a device", said(result))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_result_of_a_benchmark_is_not_written_to_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for command in ("run", "networks", "variants", "models"):
        result = runner.invoke(cli.app, ["bench", command, "--out", str(tmp_path / "pipe")])
        assert result.exit_code == 2
        assert "is no ordinary file, but a pipe or a device" in said(result)


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_page_that_cannot_be_written_loses_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "write_text", no_space)
    result = runner.invoke(cli.app, ["lab", "run", "--jobs", "1", "--json"])
    assert isinstance(result.exception, OSError)
    assert json.loads(result.stdout)["sections"][0]["verdict"] == "holds"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claim_module, "claims", lambda: {fake.name: fake})
    assert runner.invoke(cli.app, ["lab", "report"]).exit_code == 0
    assert (tmp_path / "keelnorm-lab.html").exists()


def test_a_store_that_cannot_be_written_ends_the_run_in_one_line(fake, monkeypatch):
    monkeypatch.setattr(Store, "put", no_space)
    result = runner.invoke(cli.app, ["lab", "run", "--jobs", "1"])
    assert result.exit_code == 1
    assert "No space left on device; what was measured is kept in keelnorm-lab.jsonl" in said(result)
    assert "Traceback" not in result.output


def test_what_was_there_is_left_when_a_file_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "page.html"
    write_text(path, "old")
    monkeypatch.setattr(type(path), "replace", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html'"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


def test_no_such_claim_is_said_before_whether_there_are_results(fake):
    for command in ("show", "report", "run"):
        result = runner.invoke(cli.app, ["lab", command, "bogus"])
        assert result.exit_code == 2
        assert "no claim is named 'bogus'; there are 1 fakes" in said(result)


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"claims": 3},
        {"claims": ["fakes"], "quick": True, "seeds": "many", "data": [], "folder": None, "demo": False},
        {"claims": ["fakes"], "quick": True, "seeds": 10**9, "data": [], "folder": None, "demo": False},
        {"claims": ["fakes"], "quick": True, "seeds": None, "data": None, "folder": None, "demo": False},
        {"claims": ["fakes"], "quick": True, "seeds": None, "data": [[]], "folder": 3, "demo": False},
        {"claims": ["bygone"], "quick": True, "seeds": None, "data": [], "folder": None, "demo": False},
    ],
)
def test_an_order_that_cannot_be_read_is_one_line(fake, tmp_path, order):
    (tmp_path / "keelnorm-lab.jsonl").write_text(json.dumps({"order": order}) + "\n")
    for command in ("show", "report"):
        result = runner.invoke(cli.app, ["lab", command])
        assert result.exit_code == 1
        assert "what was asked for can't be read there" in said(result)
        assert "`keelnorm lab run --out keelnorm-lab.html` measures anew" in said(result)


def test_a_progress_bar_that_cannot_be_drawn_costs_the_bar_alone(fake):
    from rich.console import Console

    from keelnorm.lab.core.laboratory import Order, run_order
    from keelnorm.lab.core.plan import Plan
    from keelnorm.lab.core.progress import ProgressBar

    with open("/dev/full", "w", buffering=1) as full:
        with ProgressBar(Console(file=full, force_terminal=True)) as bar:
            document = run_order(Order([fake], Plan()), Store(None), jobs=1, listener=bar)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert document["run"]["missing"] == document["run"]["failed"] == 0


def test_sigterm_is_a_way_to_be_stopped():
    assert exit_status.status_of(KeyboardInterrupt()) == 130
    assert exit_status.status_of(exit_status.Terminated()) == 143
