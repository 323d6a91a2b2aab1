"""A whole run, small: every row has a number or a reason."""

import json

import pytest
import torch
from support.bench_results import invoke, settings_of

from keelnorm.bench.cases import LAYOUTS, MODES, VARIANTS
from keelnorm.bench.layer_run import run_bench
from keelnorm.bench.peers import PEERS, Built, Peer
from keelnorm.bench.results import Report
from keelnorm.cli.bench import run_command

EAGER = PEERS["eager"]


def build_wrong(problem):
    built = EAGER.build(problem)
    return Built(lambda x, residual: built.call(x, residual) + 0.01, built.norm)


def build_absent(problem):
    raise ImportError("no such library")


WRONG = Peer("wrong", "batch norm that adds a little", build_wrong)
ABSENT = Peer("absent", "cannot be built", build_absent)


def test_every_row_is_complete():
    names = ["keelnorm", "eager", "relu", "copy", "clone"]
    report = run_bench(settings_of(names), progress=False)
    assert report.errors == []
    cases = len(LAYOUTS) * len(VARIANTS)
    assert len(report.rows) == cases * (3 * len(MODES) + 2 * 2)  # a copy has no backward
    for row in report.rows:
        assert row.median_us > 0
        assert len(row.samples_us) == 2
        assert row.gbps > 0
        assert row.copy_fraction > 0
        assert set(row.ratios) <= set(names) - {row.peer}
        assert (row.error_eps is not None) == PEERS[row.peer].is_batch_norm
    assert {mean.peer for mean in report.means} == {"keelnorm", "eager"}
    assert Report.from_json(report.to_json()) == report


def test_a_wrong_peer_gets_no_number():
    peers = PEERS | {"wrong": WRONG, "absent": ABSENT}
    report = run_bench(settings_of(["eager", "wrong", "absent"], variants=["bn"]), peers=peers, progress=False)
    assert {row.peer for row in report.errors} == {"wrong", "absent"}
    for row in report.rows:
        if row.peer == "eager":
            assert row.median_us > 0
            assert not row.ratios
        else:
            assert row.median_us is None
            assert row.samples_us == []
            assert row.ratios == {}
    assert "is off by" in next(row.error for row in report.rows if row.peer == "wrong")
    assert "no such library" in next(row.error for row in report.rows if row.peer == "absent")
    assert not any(mean.peer != "eager" for mean in report.means)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    report = run_bench(settings_of(["eager"], threads=1, variants=["bn"]), progress=False)
    assert report.machine.threads == 1
    assert torch.get_num_threads() == before


def test_command_prints_and_writes_json(tmp_path):
    out = tmp_path / "bench.json"
    done = invoke(
        run_command,
        *["--shape", "8x16x4x4", "--variant", "bn", "--mode", "inference,forward", "--peers", "eager,copy"],
        *["--rounds", "1", "--min-time", "0", "--json", "--out", str(out)],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(out.read_text())
    report = Report.from_json(done.stdout)
    assert report.settings.modes == ["forward", "inference"]
    assert report.settings.peers == ["eager", "copy"]


def test_command_fails_for_a_wrong_result(monkeypatch):
    monkeypatch.setitem(PEERS, "eager", Peer("eager", "wrong", build_wrong))
    done = invoke(
        run_command,
        *["--shape", "8x16x4x4", "--variant", "bn_relu", "--mode", "inference", "--peers", "eager"],
        *["--rounds", "1", "--min-time", "0"],
    )
    assert done.exit_code == 1
    assert "Not measured" in done.stdout
    assert "is off by" in done.stdout


@pytest.mark.parametrize("option", ["peers", "mode", "variant", "layout"])
def test_unknown_values_name_the_legal_ones(option):
    done = invoke(run_command, f"--{option}", "sideways")
    assert done.exit_code == 2
    assert "sideways" in done.output
    assert "legal are" in done.output


def test_no_shape_is_an_error():
    done = invoke(run_command, "--shape", "5x5")
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert "contains 5x5" in text
    assert "32x2048x7x7" in text


def test_help_names_every_peer():
    text = " ".join(invoke(run_command, "--help").output.replace("│", " ").split())
    assert all(name in text for name in PEERS)
    assert "--no-compile" in text
