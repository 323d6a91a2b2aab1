import html
import re
from dataclasses import asdict

import fakes
import plotly.graph_objects
import pytest
from fakes import fake_claim, fake_document
from rich.console import Console

from keelnorm.lab.core.claim import Reading, Source
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.core.runner import Outcome
from keelnorm.lab.reading.document import document as make_document
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.measure.page.html import page, write_page
from keelnorm.measure.page.looks import LOOKS
from keelnorm.measure.page.plots import plotly_figure
from keelnorm.measure.page.terminal import show, show_claims, show_section
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import Interval

NASTY = "<script>alert('x')</script>&\"\u2028</style>"


@pytest.fixture(scope="module")
def document():
    return fake_document()


@pytest.fixture(scope="module")
def text(document):
    return page(document)


def nasty_reading(plan, results):
    """A reading in which everything that can be text is hostile."""
    series = Series(NASTY, "none", [1.0, 2.0], [1.0, None], [0.5, None], [1.5, None])
    named = Axis(NASTY, categories=[NASTY, f"{NASTY}, again"])
    listed = [Series(NASTY, "none", [0, 1], [1.0, 2.0])]
    return Reading(
        NASTY,
        [Finding(NASTY, NASTY, Interval(1.0, 0.5, 1.5, 3), 0.0, unit=NASTY)],
        [
            Figure(NASTY, Axis(NASTY), Axis(NASTY), [series], NASTY, reference=(1.0, NASTY)),
            Figure(NASTY, named, Axis(NASTY), listed, NASTY, kind="bars"),
            Figure(NASTY, named, Axis(NASTY), listed, NASTY, kind="dots", reference=(2.0, NASTY)),
            Figure(NASTY, named, Axis(NASTY), listed, NASTY, kind="boxes"),
            Figure(NASTY, named, Axis(NASTY), listed, NASTY, kind="heatmap", value=Axis(NASTY)),
        ],
        [Table(NASTY, [NASTY], [[NASTY]])],
        setup={NASTY: NASTY},
        notes=[NASTY],
    )


def nasty_document():
    # A name is the name of a file, which no data can choose.
    nasty = fake_claim(
        title=NASTY, statement=NASTY, question=NASTY, literature=NASTY, criterion=NASTY, data=(NASTY,),
        sources=[Source(NASTY, "https://example.org/" + NASTY)], cells=lambda plan: [], read=nasty_reading,
    )  # fmt: skip
    return make_document(NASTY, [nasty], Plan(seeds=3, data=(NASTY,)), Outcome(), command=NASTY)


def texts_of(value):
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts_of(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts_of(each)]
    return [value] if isinstance(value, str) else []


def escaped(text):
    return html.escape(text, quote=False).replace("'", "&#39;")


def printed(width, show_it):
    with open("/dev/null", "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        show_it(console)
        return console.export_text()


def test_the_page_holds_every_claim_with_verdict_answer_and_text_alternatives(document, text):
    for section in document["sections"]:
        assert f'id="{section["name"]}"' in text
        assert section["command"].startswith(f"keelnorm lab run {section['name']} ")
        for part in ("statement", "question", "answer", "literature", "criterion", "command"):
            assert escaped(section[part]) in text
        assert f"{section['verdict']}</span>" in text
        for finding in section["findings"]:
            assert escaped(finding["text"]) in text
            assert escaped(finding["where"]) in text
        for source in section["sources"]:
            assert f'href="{source["url"]}"' in text
        for number, figure in enumerate(section["figures"]):
            assert f'aria-describedby="{section["name"]}-{number}-text"' in text
            assert escaped(figure["description"]) in text


def test_the_page_is_small_enough_and_whole(text):
    assert len(text.encode()) < 6_000_000
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")


def test_the_page_refers_to_nothing_outside_itself_but_its_sources(document, text):
    without_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    addresses = re.findall(r"https?://[^\"<]*", without_scripts)
    assert set(addresses) == {source["url"] for section in document["sections"] for source in section["sources"]}
    assert len(re.findall(r'<a href="https?://', without_scripts)) == len(addresses)
    assert not re.findall(r"url\(|@import|<link|<iframe|<img", without_scripts)
    assert not re.findall(r"<script[^>]*\ssrc=", text)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text():
    text = page(nasty_document())
    assert "<script>alert" not in text
    assert "</style>&" not in text
    # Plotly, the figures and the page's own script, and no fourth one.
    assert len(re.findall(r"<script\b", re.sub(r"<script>/\*\*.*?</script>", "<script>", text, flags=re.DOTALL))) == 3
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text


def test_hostile_text_is_escaped_for_plotly_too():
    assert len(nasty_document()["sections"][0]["figures"]) == 5  # and none is left out because it could not be made
    for figure in nasty_document()["sections"][0]["figures"]:
        for each in texts_of(plotly_figure(figure)):
            assert "<script" not in each
            assert "</style" not in each


def test_hostile_text_is_printed_as_it_is():
    whole = nasty_document()
    for said in (
        printed(200, lambda console: show(whole, console)),
        printed(200, lambda console: show_section(whole["sections"][0], console)),
    ):
        assert "<script>alert('x')</script>" in said


def test_plotly_accepts_every_figure(document):
    for section in document["sections"]:
        for figure in section["figures"]:
            drawn = plotly_figure(figure)
            plotly.graph_objects.Figure(drawn)  # raises on a property that does not exist
            assert drawn["data"]


def test_a_band_stops_at_a_gap():
    from dataclasses import asdict

    series = Series("s", "none", [1, 2, 3, 4], [1.0, None, 1.0, 1.0], [0.0, None, 0.0, 0.0], [2.0, None, 2.0, 2.0])
    traces = plotly_figure(asdict(Figure("t", Axis("x"), Axis("y"), [series], "d")))["data"]
    bands = [trace for trace in traces if trace["meta"]["role"] == "band"]
    assert [band["x"] for band in bands] == [[1, 1], [3, 4, 4, 3]]


def test_a_heat_map_writes_its_numbers_and_leaves_gaps_open(document):
    (figure,) = (figure for figure in document["sections"][0]["figures"] if figure["title"] == "Heat")
    (trace,) = plotly_figure(figure)["data"]
    assert trace["text"] == [["10", "-"], ["90", "95"]]
    assert trace["z"] == [[10.0, None], [90.0, 95.0]]
    assert (trace["zmin"], trace["zmax"]) == (0.0, 100.0)


def test_a_reference_line_on_a_logarithmic_axis_is_where_its_name_is(document):
    figure = next(each for each in document["sections"][0]["figures"] if each["title"] == "Logarithmic")
    layout = plotly_figure(figure)["layout"]
    assert layout["shapes"][0]["y0"] == 2.0
    assert 10 ** layout["annotations"][0]["y"] == pytest.approx(2.0)


def test_arms_differ_without_colour():
    # The two names of keelnorm's batch norm are drawn alike, and some arms never meet in one figure.
    meets = [
        ("none", "torch", "bn", "ln", "gn", "ghost", "renorm", "cross", "moving", "sync"),
        ("none", "bn", "dropout", "both", "ghost"),
        ("none", "bn", "gn", "adapted", "other-1", "other-2", "other-3"),
    ]
    for together in meets:
        assert len({(LOOKS[style]["dash"], LOOKS[style]["symbol"]) for style in together}) == len(together)
        assert len({LOOKS[style]["pattern"] for style in together}) >= min(len(together), 6)
    with pytest.raises(KeyError, match="is one of none, torch"):
        plotly_figure({"kind": "lines", "series": [{"style": "transformer"}]})


def test_the_page_is_written_whole_or_not_at_all(tmp_path, document):
    path = tmp_path / "deep" / "page.html"
    write_page(document, path)
    before = path.read_text()
    broken = {name: value for name, value in document.items() if name != "plan"}
    with pytest.raises(Exception, match="plan"):
        write_page(broken, path)
    assert path.read_text() == before
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_summary_fits_a_terminal(document, width):
    said = printed(width, lambda console: show(document, console))
    assert max(map(len, said.splitlines())) <= width
    for section in document["sections"]:
        assert section["statement"] in said
        assert section["verdict"] in said
        assert section["findings"][0]["text"] in said


def test_a_claim_in_the_terminal_has_everything_but_plots(document):
    (section,) = document["sections"]
    said = " ".join(printed(100, lambda console: show_section(section, console)).split())
    for part in ("answer", "criterion", "literature", "command"):
        assert section[part] in said
    for each in (*section["tables"][0]["rows"][0], *section["notes"], "https://example.org/paper", "(aside)"):
        assert each in said


def test_the_list_of_claims_names_each():
    rows = [{"number": 1, "name": "fakes", "title": "t", "statement": "[bold]It[/bold] is.", "data": ["digits"]}]
    said = printed(80, lambda console: show_claims(rows, console))
    assert "fakes" in said
    assert "[bold]It[/bold] is." in said


def test_failures_are_on_the_page_and_in_the_terminal():
    failed = fake_document(fails=lambda cell: cell.axes["seed"] == 1)
    assert "2 of 6 cells failed" in page(failed)
    assert "failed: fakes.accuracy" in printed(100, lambda console: show(failed, console))


def test_without_any_result_there_is_no_answer_and_a_page():
    failed = fake_document(fails=lambda cell: True)
    assert failed["sections"][0]["verdict"] == "no answer"
    assert failed["sections"][0]["answer"] == "No answer: no seed has a result for every arm."
    assert "no answer" in page(failed)


def test_what_has_not_run_is_said(document):
    plan = Plan()
    partly = Outcome(results={fakes.cells(plan)[0].key: {"accuracy": 90.0}})
    whole = make_document("t", [fake_claim()], plan, partly, command="keelnorm lab run")
    assert whole["run"]["missing"] == 5
    assert "5 of 6 cells have not run" in page(whole)


def test_bars_begin_at_zero():
    """A bar whose beginning is no 0, and two categories of one name, can't be drawn."""
    series = [Series("a", "bn", [0], [3.0])]
    named = Axis("arm", categories=["one"])
    for axis in (Axis("accuracy", limits=(91.4, 100.0)), Axis("ratio", "log")):
        with pytest.raises(ValueError, match=r"bars begin at 0.*kind='dots'"):
            Figure("A title", named, axis, series, "Text.", kind="bars")
        Figure("A title", named, axis, series, "Text.", kind="dots")
    with pytest.raises(ValueError, match="the same stand there twice"):
        Axis("state", categories=["the same", "other", "the same"])


def test_dots_show_the_reference():
    """The axis reaches to the line of no effect, however far away the estimates are."""
    figure = Figure(
        "A title", Axis("", categories=["one"]), Axis("ratio", "log"), [Series("a", "bn", [0], [8.0], [6.0], [9.0])],
        "Text.", kind="dots", reference=(1.0, "no gain"),
    )  # fmt: skip
    drawn = plotly_figure(asdict(figure))
    dots, unseen = drawn["data"]
    assert (dots["x"], dots["error_x"]["array"], dots["error_x"]["arrayminus"]) == ([8.0], [1.0], [2.0])
    assert (unseen["x"], unseen["opacity"]) == ([1.0], 0)


def test_colors_of_two_directions():
    figure = Figure(
        "A title", Axis("", categories=["one", "two"]), Axis(""), [Series("a", "bn", [0, 1], [-31.0, 5.0])], "Text.",
        kind="heatmap", value=Axis("points", middle=0.0),
    )  # fmt: skip
    (trace,) = plotly_figure(asdict(figure))["data"]
    assert (trace["zmid"], trace["meta"]["role"]) == (0.0, "diverging")
