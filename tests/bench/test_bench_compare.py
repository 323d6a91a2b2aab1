"""Two results against each other: losers first, and nothing compared that is not comparable."""

import io

import pytest
from rich.console import Console
from support.bench_results import kernel_rows, network_rows, report_of
from typer.testing import CliRunner

from keelnorm.bench.compare import compare, differences, print_comparison
from keelnorm.cli import app


def test_losers_come_first():
    before, after = report_of(kernel_rows()), report_of(kernel_rows())
    after.rows[0].median_us = 2 * before.rows[0].median_us
    comparison = compare(before, after)
    assert [change.ratio for change in comparison.changes] == pytest.approx([2, 1, 1, 1])
    assert comparison.changes[0].key[1] == before.rows[0].shape
    key = ("resnet50", "bn_relu", "both", "contiguous", "fresh")
    assert comparison.means[key] == pytest.approx(2**0.5)
    written = io.StringIO()
    print_comparison(comparison, Console(width=190, file=written))
    text = written.getvalue()
    assert text.index("2.000") < text.index("1.000")


def test_only_rows_in_both_count_and_the_others_are_named():
    before, after = report_of(kernel_rows()), report_of([*kernel_rows()[:1], *kernel_rows("reused")])
    comparison = compare(before, after)
    assert len(comparison.changes) == 1
    assert len(comparison.only_before) == 3
    assert {key[-1] for key in comparison.only_after} == {"reused"}


def test_networks_are_compared_too():
    before, after = report_of([], network_rows()), report_of([], network_rows())
    after.networks[1].step_ms = 5.0
    (change,) = compare(before, after).changes
    assert change.ratio == pytest.approx(0.5)
    assert "ResNet-50" in change.key


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="share no row of 'absent'"):
        compare(report_of(kernel_rows()), report_of(kernel_rows()), "absent")


def test_differences_are_named():
    before, after = report_of(kernel_rows()), report_of(kernel_rows())
    after.machine.keelnorm = "another"
    after.machine.revision = "abc"
    assert differences(before, after) == []
    after.machine.cpu = "another"
    after.settings.batch = 3
    assert [line.partition(":")[0] for line in differences(before, after)] == ["machine.cpu", "settings.batch"]


def test_the_command_refuses_another_machine_unless_told(tmp_path):
    before, after = report_of(kernel_rows()), report_of(kernel_rows())
    after.machine.cpu = "another"
    paths = []
    for name, report in (("a.json", before), ("b.json", after)):
        paths.append(str(tmp_path / name))
        (tmp_path / name).write_text(report.to_json())
    refused = CliRunner().invoke(app, ["bench", "compare", *paths])
    assert refused.exit_code == 1
    assert "machine.cpu" in refused.output
    assert CliRunner().invoke(app, ["bench", "compare", *paths, "--different"]).exit_code == 0
    assert CliRunner().invoke(app, ["bench", "compare", paths[0], paths[0], "--json"]).exit_code == 0
    (tmp_path / "c.json").write_text("{}")
    wrong = CliRunner().invoke(app, ["bench", "compare", paths[0], str(tmp_path / "c.json")])
    assert wrong.exit_code == 2
