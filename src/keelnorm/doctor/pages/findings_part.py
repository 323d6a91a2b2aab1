"""Findings as a page shows them, and how a page is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keelnorm.doctor.finding import Finding
from keelnorm.doctor.report_text import groups, sureness, where_found
from keelnorm.doctor.rule import Rule
from keelnorm.engine.optional_imports import lacking
from keelnorm.measure.page.html import write_page
from keelnorm.measure.page_parts import Axis, Figure, Series

TEMPLATE = "doctor.html"


def page_findings(
    findings: Sequence[Finding], rules: Mapping[str, Rule], since: int | None = None
) -> list[dict[str, Any]]:
    """Findings by rule and severity, worst first as they are given.

    Args:
        findings: The findings.
        rules: The rules by identifier.
        since: The step at which they began, in a training that was followed.
    """
    shown = []
    for group in groups(findings):
        first, rule = group[0], rules[group[0].rule]
        shown.append(
            {
                "severity": first.severity,
                "rule": rule.id,
                "name": rule.name,
                "where": where_found(group),
                "since": since,
                "message": first.message + sureness(first),
                "layers": list(dict.fromkeys(path for one in group for path in one.layers)),
                "remedy": "\n".join(first.remedy),
                "explanation": rule.explanation,
            }
        )
    return shown


def write_document(what: str, make: Callable[[], Mapping[str, Any]], path: Path) -> None:
    """Write the page of a document to a file, whole or not at all.

    Raises:
        ImportError: plotly or jinja2 is missing.
    """
    if words := lacking("bench", "jinja2", "plotly"):
        raise ImportError(f"{what}: a page needs {words}")
    write_page(make(), path, template=TEMPLATE)


def curves(title: str, x: str, y: str, description: str, series: Sequence[Series]) -> Figure:
    """A figure of curves over layers or steps, with a logarithmic axis."""
    return Figure(title, Axis(x), Axis(y, "log"), series, description)
