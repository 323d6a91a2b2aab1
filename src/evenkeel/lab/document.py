"""All that a run has to say, as one document of plain data: what `--json` prints and a page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from evenkeel.lab.cell import Results
from evenkeel.lab.environment import describe
from evenkeel.lab.experiment import Experiment, Plan
from evenkeel.lab.figures import Section
from evenkeel.lab.protocol import ARMS
from evenkeel.lab.runner import Failure, Outcome

FORMAT = 1


def read_all(experiments: Sequence[Experiment], plan: Plan, outcome: Outcome) -> list[Section]:
    """A section for each experiment, also for one whose cells failed: it then says so."""
    return [_read(experiment, plan, outcome) for experiment in experiments]


def _read(experiment: Experiment, plan: Plan, outcome: Outcome) -> Section:
    keys = {cell.key for cell in experiment.cells(plan)}
    failed = tuple(_told(failure) for failure in outcome.failures if failure.cell.key in keys)
    try:
        section = experiment.read(plan, Results(outcome.results))
    except Exception as error:  # the other experiments' figures stand
        answer = f"No answer: {error}."
        section = Section(experiment.name, experiment.title, experiment.question, answer, ())
    return replace(section, failures=failed)


def _told(failure: Failure) -> str:
    return f"{failure.cell.label()}: {failure.reason}"


def document(
    title: str,
    experiments: Sequence[Experiment],
    plan: Plan,
    outcome: Outcome,
    *,
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """The whole run as JSON can hold it.

    Args:
        title: the heading of the page.
        experiments: those that were run.
        plan: how thoroughly.
        outcome: what the runner returned.
        command: how to run it again; an experiment's own command adds `--only`.
        seconds: how long the run took.

    Returns:
        format, title, command, plan, environment, run, arms, sections: each section is `Section` as a
        dictionary, with its `command`. Numbers that are not finite are None.
    """
    sections = [
        asdict(section) | {"command": f"{command} --only {section.name}"}
        for section in read_all(experiments, plan, outcome)
    ]
    whole = {
        "format": FORMAT,
        "title": title,
        "command": command,
        "plan": asdict(plan),
        "environment": describe(),
        "run": {
            "seconds": round(seconds, 1),
            "cells": len(outcome.results) + len(outcome.failures),
            "reused": outcome.reused,
            "failed": len(outcome.failures),
        },
        "arms": [{"name": arm.name, "label": arm.label} for arm in ARMS],
        "sections": sections,
    }
    finite: dict[str, Any] = _finite(whole)
    return finite


def _finite(value: object) -> Any:
    """The value with None in place of what JSON can't write, and six digits of every number."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
