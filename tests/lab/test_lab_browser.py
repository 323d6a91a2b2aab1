"""The page as a browser sees it."""

import pytest
from fakes import fake_document
from support import browser

from keelnorm.measure.page.html import write_page

pytestmark = pytest.mark.skipif(browser.EXECUTABLE is None, reason=browser.MISSING)

PLOTS = """
[...document.querySelectorAll('.plot')].map(plot => ({
    id: plot.id,
    width: plot.getBoundingClientRect().width,
    marks: plot.querySelectorAll(
        '.scatterlayer .trace path, .barlayer .point path, .boxlayer path.box, .heatmaplayer image').length,
    legend: plot.querySelectorAll('.legend .traces').length,
    drawn: plot.querySelector('.main-svg') ? plot.querySelector('.main-svg').getBoundingClientRect().width : 0,
}))
"""


@pytest.fixture(scope="module")
def document():
    return fake_document()


@pytest.fixture(scope="module")
def path(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(document, path)
    return path


@pytest.fixture(scope="module")
def view():
    with browser.opened() as view:
        yield view


@pytest.fixture(autouse=True)
def _nothing_went_wrong(view, path):
    view.problems.clear()
    view.requests.clear()
    yield
    assert view.problems == []
    assert set(view.requests) <= {path.as_uri()}


def background(view):
    return view.evaluate("getComputedStyle(document.body).backgroundColor")


def line_colour(view):
    # Edges of bands are lines too, without width.
    return view.evaluate(
        "[...document.querySelectorAll('.scatterlayer .js-line')]"
        ".find(line => parseFloat(line.style.strokeWidth) > 0).style.stroke"
    )


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_every_plot_is_drawn_and_fits(view, path, document, width, theme):
    view.open(path, width, theme)
    plots = view.evaluate(PLOTS)
    figures = [figure for section in document["sections"] for figure in section["figures"]]
    assert {figure["kind"] for figure in figures} == {"lines", "bars", "dots", "boxes", "heatmap"}
    assert len(plots) == len(figures)
    for plot, figure in zip(plots, figures, strict=True):
        series = 1 if figure["kind"] == "heatmap" else len(figure["series"])
        assert plot["legend"] == (0 if figure["kind"] == "heatmap" else series), plot
        assert plot["marks"] >= series, plot
        assert 0 < plot["drawn"] <= plot["width"] + 1, plot
    assert view.evaluate("document.documentElement.scrollWidth") <= width


def test_the_themes_differ_and_the_button_switches_and_is_remembered(view, path):
    seen = {}
    for theme in ("light", "dark"):
        view.open(path, theme=theme)
        seen[theme] = (background(view), line_colour(view))
    assert seen["light"][0] != seen["dark"][0]
    assert seen["light"][1] != seen["dark"][1]
    view.page.click("#theme")
    view.drawn("light")
    assert (background(view), line_colour(view)) == seen["light"]
    view.open(path, theme="dark")
    assert background(view) == seen["light"][0]
    view.evaluate("localStorage.clear()")


def test_the_theme_follows_the_system_while_open(view, path):
    view.open(path, theme="light")
    before = line_colour(view)
    view.page.emulate_media(color_scheme="dark")
    view.drawn("dark")
    assert line_colour(view) != before


def test_it_prints_light_with_everything_open(view, path):
    view.open(path, theme="dark")
    view.evaluate(
        "window.addEventListener('beforeprint', () => { window.openInPrint = "
        "[...document.querySelectorAll('details')].every(each => each.open) "
        "&& document.documentElement.dataset.drawn !== 'no'; })"
    )
    assert view.page.pdf().startswith(b"%PDF")
    assert view.evaluate("window.openInPrint")
    assert not view.evaluate("[...document.querySelectorAll('details')].some(each => each.open)")
    view.page.emulate_media(media="print", color_scheme="dark")
    assert background(view) == "rgb(255, 255, 255)"


def test_plots_have_names_and_text_alternatives(view, path, document):
    view.open(path)
    for section in document["sections"]:
        for number, figure in enumerate(section["figures"]):
            plot = view.page.locator(f"#{section['name']}-{number}")
            assert plot.get_attribute("role") == "img"
            assert view.page.get_by_role("img", name=figure["title"], exact=True).count() == 1
            described = view.page.locator(f"#{plot.get_attribute('aria-describedby')}")
            assert described.inner_text() == figure["description"]


def test_every_link_within_the_page_leads_somewhere(view, path):
    view.open(path)
    missing = view.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
        ".filter(id => !document.getElementById(id))"
    )
    assert missing == []
    assert view.page.locator("#summary a[href='#fakes']").count() == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(view, path, theme):
    view.open(path, theme=theme)
    ratios = view.evaluate("""
        (() => {
            const style = getComputedStyle(document.documentElement);
            const light = (name) => {
                const hex = style.getPropertyValue(name).trim();
                const parts = [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16) / 255)
                    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
            };
            const contrast = (one, other) => {
                const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
                return (high + 0.05) / (low + 0.05);
            };
            const texts = ['--ink', '--muted', '--accent', '--failed', '--holds', '--depends', '--does-not-hold',
                '--not-resolved', '--no-answer'];
            return texts.flatMap(text => ['--paper', '--raised'].map(under => contrast(text, under)));
        })()
    """)
    assert min(ratios) >= 4.5
