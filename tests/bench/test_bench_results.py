"""Reports survive JSON, means are geometric, and what is incomplete is left out."""

import io
import json

import pytest
from rich.console import Console

from keelnorm.bench.cases import RESNET50
from keelnorm.bench.result_table import print_report
from keelnorm.bench.results import Report, Row, Settings
from keelnorm.bench.summary import means, totals
from keelnorm.measure.machine import describe


def row(shape="2x4x7x7", peer="keelnorm", **given):
    defaults = {
        "suite": "resnet50",
        "layout": "contiguous",
        "variant": "bn",
        "mode": "forward",
        "median_us": 2.0,
        "spread": 0.1,
        "disturbed": 0.0,
        "gbps": 3.0,
        "copy_fraction": 0.5,
        "samples_us": [1.0, 2.0, 3.0],
        "ratios": {"eager": 0.5},
    }
    return Row(shape=shape, peer=peer, **(defaults | given))


def report_of(rows):
    peers = ["keelnorm", "eager"]
    settings = Settings(2, ["contiguous"], ["bn"], ["forward"], [], peers, 3, 2.0)
    return Report(describe(), settings, rows, means(rows, peers), totals(rows, peers), 1.5)


def test_json_round_trip():
    wrong = Row("small", "8x16", "contiguous", "bn", "forward", "eager", error="WrongResultError: y")
    report = report_of([row(), wrong])
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["schema"] == 2


def test_other_schema_is_refused():
    data = json.loads(report_of([row()]).to_json()) | {"schema": 99}
    with pytest.raises(ValueError, match="schema 2, got 99"):
        Report.from_json(json.dumps(data))


def test_means_over_shapes():
    rows = [
        row("a", ratios={"eager": 0.2, "relu": 1.0}, copy_fraction=0.9),
        row("b", ratios={"eager": 0.8, "relu": 4.0}, copy_fraction=0.4),
        row("c", suite="small", ratios={"eager": 3.0}, copy_fraction=None),
        row("a", peer="relu"),
    ]
    first, second = means(rows, ["keelnorm"])
    assert (first.suite, first.shapes, first.peer) == ("resnet50", 2, "keelnorm")
    assert first.ratios == pytest.approx({"eager": 0.4, "relu": 2.0})
    assert first.copy_fraction == pytest.approx(0.6)
    assert second.ratios == pytest.approx({"eager": 3.0})
    assert second.copy_fraction is None


def test_no_mean_over_a_part():
    assert means([row("a"), row("b", error="WrongResultError: y", ratios={})], ["keelnorm"]) == []
    (mean,) = means([row("a"), row("b", ratios={})], ["keelnorm"])
    assert mean.ratios == {}


def network_rows():
    return [
        row("x".join(map(str, (32, *plane))), variant=variant, median_us=1000.0)
        for plane, uses in RESNET50.items()
        for variant in uses
    ]


def test_total_counts_every_layer():
    (total,) = totals(network_rows(), ["keelnorm"])
    assert total.layers == 53
    assert total.total_ms == pytest.approx(53.0)
    assert totals(network_rows()[1:], ["keelnorm"]) == []


def printed(report):
    written = io.StringIO()
    print_report(report, Console(width=150, file=written))
    return written.getvalue()


def test_table_shows_no_number_for_an_error():
    wrong = row(peer="eager", error="WrongResultError: dx is off", median_us=None, ratios={})
    text = printed(report_of([row(median_us=1234.5), wrong]))
    assert "dx is off" in text
    assert "error" in text
    assert "1234" in text
    assert "Geometric means" in text


def test_table_warns_of_a_busy_machine():
    text = printed(report_of([row(disturbed=0.8, median_us=12.0), row(peer="eager", median_us=34.0)]))
    assert "interfered in 40%" in text
    assert "~12.0" in text
    assert "~34.0" not in text
    assert "interfered" not in printed(report_of([row(disturbed=0.0)]))


def test_fresh_pages_are_marked():
    report = report_of([row(median_us=12.0, tensor_bytes=1 << 20), row(peer="eager", median_us=34.0)])
    pages = (1 << 20) / report.machine.page_bytes
    report.rows[0].page_faults = pages
    assert report.is_fresh(report.rows[0])
    assert not report.is_fresh(report.rows[1])
    text = printed(report)
    assert "12.0*" in text
    assert "34.0*" not in text
    assert "fresh pages" in text
    report.rows[0].page_faults = pages / 8
    assert not report.is_fresh(report.rows[0])
    assert "fresh pages" not in printed(report)


def test_means_come_last():
    text = printed(report_of(network_rows()))
    assert text.index("Medians") < text.index("All 53 batch norms") < text.index("Geometric means")
