"""The demo: all experiments of the laboratory's first page, run and read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenkeel.lab.document import document
from evenkeel.lab.experiment import Experiment, Plan, experiments
from evenkeel.lab.runner import Listener, run
from evenkeel.lab.store import Store

TITLE = "Batch normalization on handwritten digits"


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, in the order of the page; all where there is no name.

    Raises:
        ValueError: when a name is unknown; says which there are.
    """
    known = experiments()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no experiment is named {unknown[0]!r}; there are {', '.join(known)}")
    return [experiment for name, experiment in known.items() if not names or name in names]


def command(plan: Plan) -> str:
    """What to type for this plan."""
    words = ["evenkeel demo"]
    if plan.quick:
        words.append("--quick")
    if plan not in (Plan.fully(), Plan.quickly()):
        words.append(f"--seeds {plan.seeds}")
    return " ".join(words)


def run_demo(
    plan: Plan,
    selected: Sequence[Experiment],
    store: Store,
    *,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Run the experiments and return their document (see `evenkeel.lab.document`)."""
    start = time.perf_counter()
    cells = [cell for experiment in selected for cell in experiment.cells(plan)]
    outcome = run(cells, store, jobs=jobs, listener=listener)
    seconds = time.perf_counter() - start
    return document(TITLE, selected, plan, outcome, command=command(plan), seconds=seconds)


def results_beside(page: Path) -> Path:
    """Where the results of a page are kept: beside it, by the same name."""
    return page.with_suffix(".jsonl")
