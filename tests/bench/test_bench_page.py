"""Results in, a page out: what loses is listed, what is data is escaped, and a browser finds nothing wrong."""

import pytest
from support import browser
from support.bench_results import kernel_rows, network_rows, report_of
from typer.testing import CliRunner

from keelnorm.bench.result_figures import speed_figure
from keelnorm.bench.result_page import bench_document, losses
from keelnorm.cli import app
from keelnorm.measure.page.html import page, write_page


@pytest.fixture
def document():
    rows = [*kernel_rows(), *kernel_rows("reused", 0.9)]
    return bench_document([report_of(rows), report_of([], network_rows())])


def test_losers_are_listed_the_worst_first():
    rows = [*kernel_rows(), *kernel_rows("reused", 1.2)]
    listed = losses(rows, network_rows())
    assert [cells[2] for cells in listed] == ["0.67", "0.67", "0.80", "0.80"]
    assert all("2x128x7x7" in cells[0] for cells in listed)


def test_bars_that_lose_have_another_style():
    figure = speed_figure("title", {"a": 2.0, "b": 0.5})
    assert {series.style: series.y for series in figure.series} == {"keelnorm": [2.0], "none": [0.5]}


def test_the_page_has_all_parts(document):
    text = page(document, "bench.html")
    for part in ("Where keelnorm is slower", "2x128x7x7", "ResNet-50", "Where it ran", "times as fast", "Peak memory"):
        assert part in text


def test_data_stays_text(document):
    document["environment"]["cpu"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in page(document, "bench.html")


def test_a_wrong_result_stands_on_top():
    rows = kernel_rows()
    rows[0].error, rows[0].median_us, rows[0].ratios = "dx is off", None, {}
    assert "dx is off" in page(bench_document([report_of(rows)]), "bench.html")


def test_other_machines_and_nothing_are_refused():
    one, other = report_of(kernel_rows()), report_of(kernel_rows())
    other.machine.cpu = "another"
    with pytest.raises(ValueError, match="different cpu"):
        bench_document([one, other])
    with pytest.raises(ValueError, match="no rows"):
        bench_document([report_of([])])


def test_the_command_writes_the_page(tmp_path):
    (tmp_path / "a.json").write_text(report_of(kernel_rows()).to_json())
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["bench", "page", str(tmp_path / "a.json"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.exists()


@pytest.mark.skipif(browser.EXECUTABLE is None, reason=browser.MISSING)
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_it_without_a_complaint(document, tmp_path, width):
    path = tmp_path / "page.html"
    write_page(document, path, template="bench.html")
    with browser.opened() as view:
        for theme in ("light", "dark"):
            view.open(path, width, theme)
            drawn = view.evaluate(
                "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.point').length)"
            )
            assert drawn
            assert all(drawn)
            assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.problems == []
        assert set(view.requests) <= {path.as_uri()}
