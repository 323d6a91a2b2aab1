"""A diagnosis as a table in the terminal, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from keelnorm.doctor.evidence.layers import counted
from keelnorm.doctor.finding import SEVERITIES, Finding, Severity
from keelnorm.doctor.rule import Rule

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keelnorm.doctor.diagnosis import Diagnosis

WIDTH = 80
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_PLURALS: dict[Severity, str] = {"error": "errors", "warning": "warnings", "info": "infos"}
_INDENT = " " * 9
#: A group names so many layers at most.
_NAMED = 8
#: A smaller p-value is not told exactly: the tests are not that good.
_SMALLEST = 1e-6


class Line(NamedTuple):
    """A line of the table: parts of text, each with a style of rich."""

    parts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts).rstrip()


def plain(diagnosis: Diagnosis) -> str:
    """The table without styles."""
    return "\n".join(map(str, lines(diagnosis)))


def styled(diagnosis: Diagnosis) -> RenderableType:
    """The table for a terminal."""
    from rich.text import Text

    text = Text(overflow="fold")
    for index, line in enumerate(lines(diagnosis)):
        if index:
            text.append("\n")
        for part, style in line.parts:
            text.append(part, style)
    return text


def lines(diagnosis: Diagnosis) -> Iterator[Line]:
    """The table: a heading, the findings by rule, and what was left out."""
    yield Line(((heading(diagnosis), "bold"),))
    for findings in groups(diagnosis.findings):
        yield Line(())
        yield from _group(findings, diagnosis.rules[findings[0].rule])
    rest = [*_fixed(diagnosis), *left_out(diagnosis)]
    if rest:
        yield Line(())
    for sentence in rest:
        for line in textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_on_hyphens=False):
            yield Line(((line, "dim"),))


def heading(diagnosis: Diagnosis) -> str:
    """How many rules have found something, by severity."""
    found = groups(diagnosis.findings)
    counts = [(level, sum(group[0].severity == level for group in found)) for level in reversed(SEVERITIES)]
    said = ", ".join(f"{n} {level if n == 1 else _PLURALS[level]}" for level, n in counts if n) or "nothing found"
    rules = len(diagnosis.rules)
    return f"diagnose: {said} in {counted(len(diagnosis.layers))}, {rules} rule{'s' * (rules != 1)} run"


def groups(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of the same rule and severity, in the order of the first of each."""
    found: dict[tuple[str, Severity], list[Finding]] = {}
    for finding in findings:
        found.setdefault((finding.rule, finding.severity), []).append(finding)
    return list(found.values())


def _group(findings: list[Finding], rule: Rule) -> Iterator[Line]:
    first = findings[0]
    layers = list(dict.fromkeys(path for one in findings for path in one.layers))
    where = where_found(findings)
    yield Line(
        ((f"{first.severity:<9}", _STYLES[first.severity]), (f"{rule.id} {rule.name}", "bold"), (f"  {where}", ""))
    )
    yield from _wrapped(first.message + sureness(first))
    if len(findings) > 1:
        yield from _wrapped(f"The same in {_listed(layers, first.layers)}.")
    for line in first.remedy:
        yield Line(((f"{_INDENT}  {line}", "green"),))


def where_found(findings: Sequence[Finding]) -> str:
    """The layers of findings in a heading: the one, or how many."""
    layers = list(dict.fromkeys(path for one in findings for path in one.layers))
    return "the model" if not layers else f"{len(layers)} layers" if len(layers) > 1 else layers[0] or "the model"


def sureness(finding: Finding) -> str:
    """The p-value of a finding behind its message; nothing for a fact."""
    if finding.p_value is None:
        return ""
    return f" (p = {finding.p_value:.2g})" if finding.p_value >= _SMALLEST else f" (p < {_SMALLEST:g})"


def _listed(layers: list[str], without: Sequence[str]) -> str:
    others = [path for path in layers if path not in without]
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return ", ".join(others[:_NAMED]) + more


def _wrapped(text: str) -> Iterator[Line]:
    for line in textwrap.wrap(text, WIDTH - len(_INDENT), break_on_hyphens=False):
        yield Line(((_INDENT + line, ""),))


def _fixed(diagnosis: Diagnosis) -> Iterator[str]:
    for one in diagnosis.fixed:
        where = ", ".join(one.finding.layers) or "the model"
        yield f"Fixed {one.finding.rule} {diagnosis.rules[one.finding.rule].name} in {where}: {one.done}."


def left_out(diagnosis: Diagnosis) -> Iterator[str]:
    """Sentences about what is not in the table: silenced and known findings, rules that were not run, notes."""
    for name, findings in (("silenced", diagnosis.silenced), ("in the baseline", diagnosis.known)):
        if findings:
            yield f"{len(findings)} more {name}."
    reasons: dict[str, list[str]] = {}
    for rule, reason in diagnosis.skipped.items():
        reasons.setdefault(reason, []).append(rule)
    for reason, rules in reasons.items():
        yield f"Not run: {', '.join(rules)} ({reason})."
    yield from diagnosis.notes
