"""The page of a diagnosis: findings, and the model's layers in order with what was measured of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from keelnorm.doctor.pages.findings_part import curves, page_findings
from keelnorm.doctor.report_text import heading, left_out
from keelnorm.measure.machine import describe, facts_of
from keelnorm.measure.page_parts import Figure, Section, Series, Table

if TYPE_CHECKING:
    from keelnorm.doctor.diagnosis import Diagnosis

_CALL = "kn.diagnose(model, batches).write_page('doctor.html')"
#: Number, name in the legend, and style.
_CHANGES = (
    ("drift", "running statistics", "other-1"),
    ("noise", "statistics of one batch", "keelnorm"),
    ("limit", "statistics of 16 samples", "none"),
)


def diagnosis_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """What the page of a diagnosis shows, as plain values."""
    return {
        "title": "Batch norms of a model",
        "answer": heading(diagnosis).removeprefix("diagnose: ").capitalize() + ".",
        "environment": facts_of(describe()),
        "findings": page_findings(diagnosis.findings, diagnosis.rules),
        "notes": list(left_out(diagnosis)),
        "sections": [asdict(_layers(diagnosis))],
        "command": _CALL,
    }


def _layers(diagnosis: Diagnosis) -> Section:
    facts = diagnosis.facts
    figures = [figure for figure in (_changes(facts), _gradients(facts)) if figure is not None]
    return Section(
        name="layers",
        title="Layers",
        question="What does each layer normalize with?",
        answer=_answer(facts) if figures else "Nothing was measured: batches show drift and noise.",
        command=_CALL,
        figures=figures,
        tables=[_table(diagnosis)],
        setup=[
            (
                "change",
                "the root of the mean square, over values and channels, of what normalized values change by when they "
                "are normalized with those statistics instead of with the moments of all data",
            ),
            ("running statistics", "what chance explains, with so many samples, is subtracted"),
            ("statistics of a batch", "from how much samples differ: positions of one sample are not independent"),
            (
                "effective values",
                "how many independent values the mean of a batch is as exact as, median over channels",
            ),
            ("layers", "in the order in which they run, where a run has shown it"),
        ],
        open=True,
    )


def _answer(facts: Sequence[Mapping[str, Any]]) -> str:
    known = [one for one in facts if one.get("drift") is not None and one.get("limit") is not None]
    if not known:
        return "No layer has running statistics that could be compared with the data's."
    far = [one for one in known if one["drift"] > one["limit"]]
    worst = max(known, key=lambda one: one["drift"])
    if not worst["drift"]:
        return (
            f"The running statistics of all {len(known)} layers are those of the data, as far as chance lets one see."
        )
    return (
        f"The running statistics of {len(far)} of {len(known)} layers change normalized values more than the "
        f"statistics of 16 samples do; most in {worst['path'] or 'the model'}, by {worst['drift']:.2g} standard "
        "deviations."
    )


def _changes(facts: Sequence[Mapping[str, Any]]) -> Figure | None:
    series = [made for name, label, style in _CHANGES if (made := _series(facts, name, label, style)) is not None]
    if not series:
        return None
    return curves(
        "How far normalized values change with other statistics",
        "layer, in the order of the model",
        "standard deviations",
        "A curve each for the running statistics, the statistics of one batch, and those of 16 samples, which cost "
        "nearly nothing. Where the running statistics are the highest, evaluation differs from training. "
        "The table has the numbers.",
        series,
    )


def _gradients(facts: Sequence[Mapping[str, Any]]) -> Figure | None:
    made = _series(facts, "gradient", "gradient", "keelnorm")
    if made is None:
        return None
    return curves(
        "Gradients through depth",
        "layer, in the order of the model",
        "norm",
        "The norm of the loss's gradient at each layer in one training step. A straight slope means that it grows or "
        "shrinks by the same factor at each layer.",
        [made],
    )


def _series(facts: Sequence[Mapping[str, Any]], name: str, label: str, style: str) -> Series | None:
    """The curve of a number over the layers; values that a logarithmic axis lacks are gaps."""
    values = [one.get(name) for one in facts]
    if not any(values):
        return None
    return Series(label, style, [float(n) for n in range(1, len(facts) + 1)], [value or None for value in values])


def _table(diagnosis: Diagnosis) -> Table:
    found: dict[str, list[str]] = {}
    for one in diagnosis.findings:
        for path in one.layers:
            found.setdefault(path, []).append(f"{one.rule} {diagnosis.rules[one.rule].name}")
    numbers = [
        name for name in ("drift", "noise", "effective", "gradient") if any(one.get(name) for one in diagnosis.facts)
    ]
    headings = {"effective": "effective values"}
    return Table(
        "The batch norms, in the order of the model",
        [
            "",
            "layer",
            "findings",
            *(headings.get(name, name) for name in numbers),
            "kind",
            "channels",
            "mode",
            "behind",
            "in front of",
        ],
        [
            [
                str(index),
                one["path"] or "the model",
                ", ".join(dict.fromkeys(found.get(one["path"], []))) or "-",
                *("-" if one.get(name) is None else f"{one[name]:.3g}" for name in numbers),
                one["kind"],
                "-" if one["channels"] is None else str(one["channels"]),
                one["mode"],
                ", ".join(one["before"]) or "-",
                ", ".join(one["after"]) or "-",
            ]
            for index, one in enumerate(diagnosis.facts, 1)
        ],
    )
