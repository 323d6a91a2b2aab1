"""Made-up claims whose results are known, so that runner, document, page and terminal can be tested at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from keelnorm.lab.core.cell import Cell, Failure, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds
from keelnorm.lab.core.runner import Outcome
from keelnorm.lab.reading.document import document
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import difference, mean


def accuracy(*, arm: str, seed: int) -> Result:
    return {"accuracy": 90.0 + (5.0 if arm == "bn" else 0.0) + random.Random(f"{arm} {seed}").random()}


def cells(plan: Plan) -> Sequence[Cell]:
    return [
        Cell(accuracy, {"arm": arm, "seed": seed}) for arm in ("none", "bn") for seed in Seeds(quick=3, full=5).of(plan)
    ]


def read(plan: Plan, results: Results) -> Reading:
    runs = Runs(cells(plan), results)
    by_arm = {arm: [result["accuracy"] for result in runs.of(arm)] for arm in ("none", "bn")}
    gain = difference(by_arm["bn"], by_arm["none"])
    bars = Axis("arm", categories=["first, one", "second"])
    return Reading(
        f"Batch norm gains {gain.text()} points.",
        [
            Finding("accuracy, batch norm − none", "made up", gain, 0.0),
            Finding("accuracy of batch norm", "aside", mean(by_arm["bn"]), 99.0, unit="%", decisive=False),
        ],
        [
            Figure("Lines", Axis("steps", scale="log"), Axis("accuracy"), _lines(), "Lines.", reference=(2.0, "two")),
            Figure("Logarithmic", Axis("x"), Axis("y", scale="log"), _lines(), "Log.", reference=(2.0, "two")),
            Figure(
                "Bars", bars, Axis("value"), [_bars("none"), _bars("bn")], "Bars.", kind="bars", reference=(1.5, "r")
            ),
            Figure(
                "Dots",
                bars,
                Axis("ratio", "log"),
                [_bars("none"), _bars("bn")],
                "Dots.",
                kind="dots",
                reference=(0.5, "r"),
            ),
            Figure("Boxes", bars, Axis("value"), [_boxes("none"), _boxes("bn")], "Boxes.", kind="boxes"),
            Figure(
                "Heat",
                Axis("rate", categories=["0.1", "1"]),
                Axis("scale"),
                [Series("small", "bn", [0, 1], [10.0, None]), Series("large", "bn", [0, 1], [90.0, 95.0])],
                "Heat.",
                kind="heatmap",
                value=Axis("accuracy, %", limits=(0.0, 100.0)),
            ),
            Figure(
                "Both ways",
                Axis("rate", categories=["0.1", "1"]),
                Axis("scale"),
                [Series("small", "bn", [0, 1], [-10.0, None]), Series("large", "bn", [0, 1], [3.0, 0.0])],
                "Both ways.",
                kind="heatmap",
                value=Axis("points", middle=0.0),
            ),
        ],
        [Table("Numbers", ["arm", "accuracy"], [[arm, mean(values).text()] for arm, values in by_arm.items()])],
        setup={"Data": "made up"},
        notes=["A note."],
    )


def _lines() -> list[Series]:
    x = [1.0, 2.0, 4.0]
    return [
        Series(style, style, x, [1.0, 2.0 + place, 3.0], [0.5, 1.5, 2.5], [1.5, 3.5, 3.5])
        for place, style in enumerate(("none", "torch", "bn"))
    ]


def _bars(style: str) -> Series:
    return Series(style, style, [0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5])


def _boxes(style: str) -> Series:
    return Series(style, style, [0, 0, 0, 1, 1, 1], [1.0, 2.0, 3.0, 2.0, 3.0, 4.0])


def fake_claim(**other: Any) -> Claim:
    """A claim of this module; named after it."""
    parts: dict[str, Any] = {
        "number": 1,
        "title": "A title",
        "statement": "It is better.",
        "question": "Is it better?",
        "literature": "Some say so.",
        "sources": [Source("Somebody 2020", "https://example.org/paper")],
        "criterion": "Holds if it is.",
        "data": ("digits",),
        "cells": cells,
        "read": read,
    }
    return Claim(**parts | other)


def outcome_of(plan: Plan, claims: Sequence[Claim], fails: Callable[[Cell], bool] = lambda cell: False) -> Outcome:
    """Results of all cells, except of those that fail."""
    outcome = Outcome()
    for cell in (cell for claim in claims for cell in claim.cells(plan)):
        if fails(cell):
            outcome.failures.append(Failure(cell, "ValueError: made to fail", "Traceback ..."))
        else:
            outcome.results[cell.key], outcome.seconds[cell.key] = cell.task(**cell.axes), 0.5
    return outcome


def fake_document(plan: Plan | None = None, fails: Callable[[Cell], bool] = lambda cell: False) -> dict[str, Any]:
    """A whole document of made-up results, of two claims."""
    plan = plan or Plan()
    claims = [fake_claim()]
    return document("A title", claims, plan, outcome_of(plan, claims, fails), command="keelnorm lab run --quick")
