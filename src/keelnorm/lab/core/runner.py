"""Runs cells: in parallel, or one at a time where they are exclusive; goes on when one fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from keelnorm.lab.core.cell import Cell, Ended, Failure, Result
from keelnorm.lab.core.parallel import in_parallel
from keelnorm.lab.core.store import Store


@dataclass
class Outcome:
    """What a run gave: results and seconds by cell key, the cells that failed, and how many were stored before."""

    results: dict[str, Result] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    reused: int = 0


class Listener(Protocol):
    """Is told how a run proceeds."""

    def begin(self, cells: list[Cell], *, alone: bool) -> None:
        """These cells are about to run; `alone` where one at a time, so that nothing disturbs their timing."""

    def done(self, cell: Cell, failure: Failure | None) -> None:
        """This cell has ended."""


class Silent:
    """A listener that says nothing."""

    def begin(self, cells: list[Cell], *, alone: bool) -> None:
        """Nothing."""

    def done(self, cell: Cell, failure: Failure | None) -> None:
        """Nothing."""


def stored(cells: Iterable[Cell], store: Store) -> Outcome:
    """What the store has of these cells. Nothing is run; what it lacks is missing."""
    outcome = Outcome()
    for cell in {cell.key: cell for cell in cells}.values():
        known = store.get(cell)
        if known is not None:
            outcome.results[cell.key], outcome.seconds[cell.key] = known
            outcome.reused += 1
    return outcome


def run(
    cells: Iterable[Cell],
    store: Store,
    *,
    jobs: int | None = None,
    folder: Path | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Run the cells that the store lacks, and keep each result as it comes.

    Inside `core.clusters.cluster`, or `joblib.parallel_config` with a backend of the caller's, they run there.

    Args:
        cells: the work; a cell that is asked for twice runs once.
        store: gives what is known and takes what is new.
        jobs: processes at once; None: one a core. Exclusive cells run after the others,
            one at a time in this process.
        folder: the reader's data, for the cells whose data are there.
        listener: told of progress.

    Returns:
        Results by cell key; a cell that raised is among the failures, and the rest has run.
    """
    every = list({cell.key: cell for cell in cells}.values())
    outcome = stored(every, store)
    listener = listener or Silent()
    todo = [cell for cell in every if cell.key not in outcome.results]
    # The longest first, so that no process is left alone with a long one at the end, and exclusive ones last. After a
    # run that was cut short the other way round: what cut it short may do so again before a long one has ended.
    short_first = store.was_cut_short
    todo.sort(key=lambda cell: cell.cost if short_first else -cell.cost)
    if todo:
        store.begin()
    for exclusive in (short_first, not short_first):
        cells = [cell for cell in todo if cell.exclusive == exclusive]
        if not cells:
            continue
        listener.begin(cells, alone=exclusive)
        if exclusive:
            _gather((attempt(folder, cell) for cell in cells), outcome, store, listener)
        else:
            _gather(in_parallel(cells, partial(attempt_on_one_thread, folder), jobs), outcome, store, listener)
    if todo:
        store.end()
    return outcome


def _gather(ended: Iterable[Ended], outcome: Outcome, store: Store, listener: Listener) -> None:
    for cell, result, seconds in ended:
        failure = result if isinstance(result, Failure) else None
        if isinstance(result, Failure):
            outcome.failures.append(result)
        else:
            store.put(cell, result, seconds)
            # As it is read back: a run that was stopped and one that was not have the same numbers to the last digit.
            outcome.results[cell.key], outcome.seconds[cell.key] = store.get(cell) or (result, seconds)
        listener.done(cell, failure)


def attempt(folder: Path | None, cell: Cell) -> Ended:
    """Run a cell; an exception becomes a `Failure`."""
    from keelnorm.lab.data.data_folder import reading_from

    start = time.process_time()
    result: Result | Failure
    try:
        with reading_from(folder):
            result = cell.task(**cell.axes)
    except Exception as error:  # one cell's error, whatever it is, must not end the others
        reason = f"{type(error).__name__}: {error}"
        result = Failure(cell, reason, traceback.format_exc())
    return cell, result, time.process_time() - start


def attempt_on_one_thread(folder: Path | None, cell: Cell) -> Ended:
    """Run a cell as `attempt` does, with torch on one thread."""
    from keelnorm.lab.core.threads import one_thread

    with one_thread():
        return attempt(folder, cell)
