"""The page as a browser sees it."""

import json

import chromium
import pytest
from fakes import fake_document

from evenkeel.report.page import write_page

executable = chromium.find()
pytestmark = pytest.mark.skipif(executable is None, reason="no Chromium is installed on this machine")

PLOTS = """
[...document.querySelectorAll('.plot')].map(plot => ({
    id: plot.id,
    width: plot.getBoundingClientRect().width,
    marks: plot.querySelectorAll('.scatterlayer .trace path, .barlayer .point path').length,
    legend: plot.querySelectorAll('.legend .traces').length,
    drawn: plot.querySelector('.main-svg') ? plot.querySelector('.main-svg').getBoundingClientRect().width : 0,
}))
"""


@pytest.fixture(scope="module")
def document():
    return fake_document()


@pytest.fixture(scope="module")
def address(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(document, path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Browser(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _nothing_went_wrong(browser, address):
    browser.problems.clear()
    browser.requests.clear()
    yield
    assert browser.problems == []
    assert set(browser.requests) <= {address.as_uri()}


def background(browser):
    return browser.evaluate("getComputedStyle(document.body).backgroundColor")


def line_colour(browser):
    # Edges of bands are lines too, without width.
    return browser.evaluate(
        "[...document.querySelectorAll('.scatterlayer .js-line')]"
        ".find(line => parseFloat(line.style.strokeWidth) > 0).style.stroke"
    )


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_every_plot_is_drawn_and_fits(browser, address, document, width, theme):
    browser.view(width, 900, theme)
    browser.open(address)
    plots = browser.evaluate(PLOTS)
    figures = [figure for section in document["sections"] for figure in section["figures"]]
    assert len(plots) == len(figures)
    for plot, figure in zip(plots, figures, strict=True):
        assert plot["legend"] == len(figure["series"]), plot
        assert plot["marks"] >= len(figure["series"]), plot
        assert 0 < plot["drawn"] <= plot["width"] + 1, plot
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_the_themes_differ_and_the_button_switches_and_is_remembered(browser, address):
    seen = {}
    for theme in ("light", "dark"):
        browser.view(1280, 900, theme)
        browser.open(address)
        seen[theme] = (background(browser), line_colour(browser))
    assert seen["light"][0] != seen["dark"][0]
    assert seen["light"][1] != seen["dark"][1]
    browser.evaluate("document.getElementById('theme').click()")
    assert (background(browser), line_colour(browser)) == seen["light"]
    browser.open(address)
    assert background(browser) == seen["light"][0]
    browser.evaluate("localStorage.clear()")


def test_the_theme_follows_the_system_while_open(browser, address):
    browser.view(1280, 900, "light")
    browser.open(address)
    before = line_colour(browser)
    browser.view(1280, 900, "dark")
    assert browser.evaluate("new Promise(done => setTimeout(() => done(true), 100))")
    assert line_colour(browser) != before


def test_it_prints_light_with_everything_open(browser, address):
    browser.view(1280, 900, "dark")
    browser.open(address)
    browser.evaluate(
        "window.addEventListener('beforeprint', () => { window.openInPrint = "
        "[...document.querySelectorAll('details')].every(each => each.open); })"
    )
    assert browser.pdf().startswith(b"%PDF")
    assert browser.evaluate("window.openInPrint")
    assert not browser.evaluate("[...document.querySelectorAll('details')].some(each => each.open)")
    browser.view(1280, 900, "dark", media="print")
    assert background(browser) == "rgb(255, 255, 255)"
    browser.view(1280, 900, "dark")


def test_plots_have_names_and_text_alternatives(browser, address, document):
    browser.view(1280, 900, "light")
    browser.open(address)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    images = [
        (node["name"]["value"], node.get("description", {}).get("value", ""))
        for node in tree
        if node.get("role", {}).get("value") in ("image", "img") and not node.get("ignored")
    ]
    for section in document["sections"]:
        for figure in section["figures"]:
            assert (figure["title"], figure["description"]) in images, json.dumps(images)[:500]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(browser, address, theme):
    browser.view(1280, 900, theme)
    browser.open(address)
    ratios = browser.evaluate("""
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
            return ['--ink', '--muted', '--accent', '--failed'].flatMap(
                text => ['--paper', '--raised'].map(under => contrast(text, under)));
        })()
    """)
    assert min(ratios) >= 4.5
