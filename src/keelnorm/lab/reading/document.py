"""The document of a run: plain data that `--json` prints, and that pages are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from keelnorm.lab.core.cell import Failure, Results
from keelnorm.lab.core.claim import Claim, Reading
from keelnorm.lab.core.environment import describe
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.core.runner import Outcome
from keelnorm.lab.reading.verdicts import MEANING, Finding, verdict

FORMAT = 2


def document(
    title: str,
    claims: Sequence[Claim],
    plan: Plan,
    outcome: Outcome,
    *,
    command: str,
) -> dict[str, Any]:
    """The whole run as JSON can hold it.

    Args:
        title: the heading of the page.
        claims: those that were run.
        plan: how thoroughly.
        outcome: what the runner returned.
        command: how to run it again, without names of claims.

    Returns:
        format, title, command, plan, environment, run, verdicts (what each means) and sections, one a claim: what the
        claim's file says about it, its verdict, and its reading. Numbers that are not finite are None. All of it
        follows from what is stored, so a run that was stopped and went on has the same document.
    """
    sections = [section(claim, plan, outcome, command=command) for claim in claims]
    asked = {cell.key for claim in claims for cell in claim.cells(plan)}
    whole = {
        "format": FORMAT,
        "title": title,
        "command": command,
        "plan": asdict(plan),
        "environment": describe(),
        "run": {
            "cells": len(asked),
            "core_seconds": round(math.fsum(outcome.seconds.values()), 1),
            "failed": len(outcome.failures),
            "missing": len(asked) - len(outcome.results) - len(outcome.failures),
        },
        "verdicts": dict(MEANING),
        "sections": sections,
    }
    finite: dict[str, Any] = _as_json(whole)
    return finite


def section(claim: Claim, plan: Plan, outcome: Outcome, *, command: str) -> dict[str, Any]:
    """What one claim says; where its cells failed, it says that."""
    cells = claim.cells(plan)
    keys = {cell.key for cell in cells}
    failed = [failure for failure in outcome.failures if failure.cell.key in keys]
    try:
        reading = claim.read(plan, Results(outcome.results))
    except Exception as error:  # the other claims' figures stand
        reading = Reading(f"No answer: {error}.", (), (), (), {})
    return {
        "name": claim.name,
        "number": claim.number,
        "title": claim.title,
        "statement": claim.statement,
        "question": claim.question,
        "literature": claim.literature,
        "sources": [asdict(source) for source in claim.sources],
        "criterion": claim.criterion,
        "earlier": [asdict(one) for one in claim.earlier],
        "data": list(claim.data),
        "verdict": verdict(reading.findings),
        "answer": reading.answer,
        "findings": [_finding(finding) for finding in reading.findings],
        "figures": [asdict(figure) for figure in reading.figures],
        "tables": [asdict(table) for table in reading.tables],
        "setup": [list(pair) for pair in reading.setup.items()],
        "notes": list(reading.notes),
        "failures": [_failure_text(failure) for failure in failed],
        "cells": len(keys),
        "core_seconds": round(math.fsum(outcome.seconds.get(key, 0.0) for key in keys), 1),
        "command": command.replace("keelnorm lab run", f"keelnorm lab run {claim.name}", 1),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return asdict(finding) | {"outcome": finding.outcome, "text": finding.text()}


def _failure_text(failure: Failure) -> str:
    return f"{failure.cell.label()}: {failure.reason}"


def _as_json(value: object) -> Any:
    """The value with six digits of every number, and None for numbers that JSON can't write."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    return value
