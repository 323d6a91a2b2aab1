import html
import re

import plotly.graph_objects
import pytest
from fakes import fake_document
from rich.console import Console

from evenkeel.lab.document import document as make_document
from evenkeel.lab.experiment import Plan
from evenkeel.lab.figures import Axis, Figure, Measure, Section, Series, Table
from evenkeel.lab.runner import Outcome
from evenkeel.lab.statistics import Interval
from evenkeel.report.page import page, write_page
from evenkeel.report.plots import plotly_figure
from evenkeel.report.terminal import show

NASTY = "<script>alert('x')</script>&\"\u2028</style>"
ARMS = ["none", "torch", "evenkeel"]


@pytest.fixture(scope="module")
def document():
    return fake_document()


@pytest.fixture(scope="module")
def text(document):
    return page(document)


class Nasty:
    """An experiment in which everything that can be text is hostile."""

    name, title, question, order = "nasty", NASTY, NASTY, 0

    def cells(self, plan):
        return []

    def read(self, plan, results):
        interval = Interval(1.0, 0.5, 1.5, 3)
        series = Series(NASTY, "none", [1.0, 2.0], [1.0, None], [0.5, None], [1.5, None])
        bars = Axis(NASTY, categories=[NASTY, NASTY])
        return Section(
            self.name,
            NASTY,
            NASTY,
            NASTY,
            setup=[(NASTY, NASTY)],
            measures=[Measure(NASTY, NASTY, {"none": interval}, {"none": NASTY}, NASTY)],
            figures=[
                Figure(NASTY, Axis(NASTY), Axis(NASTY), [series], NASTY, reference=(1.0, NASTY)),
                Figure(NASTY, bars, Axis(NASTY), [Series(NASTY, "none", [0, 1], [1.0, 2.0])], NASTY, kind="bars"),
            ],
            tables=[Table(NASTY, [NASTY], [[NASTY]])],
            notes=[NASTY],
            failures=[NASTY],
        )


def nasty_page():
    return page(make_document(NASTY, [Nasty()], Plan(3), Outcome(), command=NASTY, seconds=1.0))


def texts_of(value):
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts_of(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts_of(each)]
    return [value] if isinstance(value, str) else []


def test_the_page_holds_every_experiment_with_answer_and_text_alternatives(document, text):
    for section in document["sections"]:
        assert f'id="{section["name"]}"' in text
        assert html.escape(section["answer"], quote=False).replace("'", "&#39;") in text
        assert html.escape(section["command"]) in text
        for number, figure in enumerate(section["figures"]):
            assert f'aria-describedby="{section["name"]}-{number}-text"' in text
            assert html.escape(figure["description"], quote=False).replace("'", "&#39;") in text
    for measure in document["sections"][0]["measures"]:
        assert measure["comparison"] in text


def test_the_page_is_small_enough_and_whole(text):
    assert len(text.encode()) < 6_000_000
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")


def test_the_page_refers_to_nothing_outside_itself(text):
    without_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"https?://|url\(|@import|<link|<iframe|<img", without_scripts)
    assert not re.findall(r"<script[^>]*\ssrc=", text)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text():
    text = nasty_page()
    assert "<script>alert" not in text
    assert "</style>&" not in text
    # Plotly, the figures and the page's own script, and no fourth one.
    assert len(re.findall(r"<script\b", re.sub(r"<script>/\*\*.*?</script>", "<script>", text, flags=re.DOTALL))) == 3
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text


def test_hostile_text_is_escaped_for_plotly_too():
    whole = make_document(NASTY, [Nasty()], Plan(3), Outcome(), command=NASTY, seconds=1.0)
    for figure in whole["sections"][0]["figures"]:
        for each in texts_of(plotly_figure(figure, ARMS)):
            assert "<script" not in each
            assert "</style" not in each


def test_plotly_accepts_every_figure(document):
    for section in document["sections"]:
        for figure in section["figures"]:
            drawn = plotly_figure(figure, ARMS)
            plotly.graph_objects.Figure(drawn)  # raises on a property that does not exist
            assert drawn["data"]


def test_a_band_stops_at_a_gap():
    series = Series("s", "none", [1, 2, 3, 4], [1.0, None, 1.0, 1.0], [0.0, None, 0.0, 0.0], [2.0, None, 2.0, 2.0])
    figure = Figure("t", Axis("x"), Axis("y"), [series], "d")
    whole = make_document("t", [], Plan(3), Outcome(), command="c", seconds=1.0)
    assert whole["sections"] == []
    from dataclasses import asdict

    traces = plotly_figure(asdict(figure), ARMS)["data"]
    bands = [trace for trace in traces if trace["meta"]["role"] == "band"]
    assert [band["x"] for band in bands] == [[1, 1], [3, 4, 4, 3]]


def test_arms_differ_without_colour(document):
    figure = document["sections"][1]["figures"][0]
    lines = [trace for trace in plotly_figure(figure, ARMS)["data"] if trace["meta"]["role"] == "line"]
    looks = {(trace["line"]["dash"], trace["line"]["width"], trace["marker"]["symbol"]) for trace in lines}
    assert len(looks) == 3


def test_an_arm_of_a_later_experiment_gets_a_look_of_its_own(document):
    figure = dict(document["sections"][1]["figures"][0])
    figure["series"] = [dict(figure["series"][0], style=style) for style in ("none", "layer", "group")]
    arms = [*ARMS, "layer", "group"]
    lines = [trace for trace in plotly_figure(figure, arms)["data"] if trace["meta"]["role"] == "line"]
    assert len({trace["meta"]["colour"] for trace in lines}) == 3


def test_the_page_is_written_whole_or_not_at_all(tmp_path, document):
    path = tmp_path / "deep" / "page.html"
    write_page(document, path)
    before = path.read_text()
    broken = {name: value for name, value in document.items() if name != "plan"}
    with pytest.raises(Exception, match="plan"):
        write_page(broken, path)
    assert path.read_text() == before
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(document, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(document, console)
    console.file.close()
    printed = console.export_text()
    for section in document["sections"]:
        assert section["question"] in printed
        for measure in section["measures"]:
            lines = [line for line in printed.splitlines() if line.startswith(f"  {measure['where']} ")]
            assert any(line.rstrip().endswith(measure["comparison"]) for line in lines)


def test_failures_are_on_the_page_and_in_the_terminal():
    failed = fake_document(fails=lambda cell: cell.axes["seed"] == 1)
    assert "cells failed" in page(failed)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(failed, console)
    console.file.close()
    assert "failed: tasks.curves" in console.export_text()
