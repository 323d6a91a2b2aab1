"""One HTML file that shows a document and loads nothing: it contains Plotly, styles and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keelnorm.engine.atomic_write import write_text
from keelnorm.measure.page.plots import plotly_figure

_HERE = Path(__file__).parent


def page(document: Mapping[str, Any], template: str = "page.html") -> str:
    """Render the page of a document; all its text is escaped.

    Args:
        document: Plain data.
        template: A file beside this one: `page.html` of the laboratory, or `bench.html` of the benchmarks.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {
        f"{section['name']}-{number}": plotly_figure(figure)
        for section in document["sections"]
        for number, figure in enumerate(section["figures"])
    }
    return environment.get_template(template).render(
        document=document,
        figures=figures,
        # Our own files, not data: they are not escaped.
        plotly=Markup(get_plotlyjs()),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
    )


def write_page(document: Mapping[str, Any], path: Path, template: str = "page.html") -> None:
    """Write the page of a document to a file, whole or not at all."""
    write_text(path, page(document, template))
