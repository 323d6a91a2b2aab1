"""Runs cells: in parallel where they may, alone where they must, and on when one fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from evenkeel.lab.cell import Cell, Result
from evenkeel.lab.store import Store
from evenkeel.machine import cores


@dataclass(frozen=True)
class Failure:
    """A cell that raised: which, why in a line, and the whole traceback."""

    cell: Cell
    reason: str
    traceback: str


@dataclass
class Outcome:
    """What a run gave: results by cell key, the cells that failed, how many were already stored."""

    results: dict[str, Result] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    reused: int = 0


class Listener(Protocol):
    """Who is told how a run gets on."""

    def begin(self, cells: list[Cell], *, alone: bool) -> None:
        """These cells are about to run; alone: one at a time, and disturbed by all that goes on."""

    def done(self, cell: Cell, failure: Failure | None) -> None:
        """This cell has ended."""


class Silent:
    """A listener that says nothing."""

    def begin(self, cells: list[Cell], *, alone: bool) -> None:
        """Nothing."""

    def done(self, cell: Cell, failure: Failure | None) -> None:
        """Nothing."""


Ended = tuple[Cell, Result | Failure, float]


def run(
    cells: Iterable[Cell],
    store: Store,
    *,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Run the cells that the store lacks, and keep each result as it comes.

    Args:
        cells: the work; a cell that is asked for twice runs once.
        store: gives what is known and takes what is new.
        jobs: processes to run beside each other; None: one a core. Exclusive cells run after the others,
            one at a time in this process.
        listener: told of progress.

    Returns:
        Results by cell key; a cell that raised is among the failures, and the rest has run.
    """
    outcome = Outcome()
    listener = listener or Silent()
    todo: list[Cell] = []
    for cell in {cell.key: cell for cell in cells}.values():
        known = store.get(cell)
        if known is None:
            todo.append(cell)
        else:
            outcome.results[cell.key] = known
            outcome.reused += 1
    # The longest first, so that no process is left alone with a long one at the end.
    together = sorted((cell for cell in todo if not cell.exclusive), key=lambda cell: -cell.cost)
    if together:
        listener.begin(together, alone=False)
        _gather(_in_parallel(together, cores() if jobs is None else jobs), outcome, store, listener)
    alone = [cell for cell in todo if cell.exclusive]
    if alone:
        listener.begin(alone, alone=True)
        _gather((_attempt(cell) for cell in alone), outcome, store, listener)
    return outcome


def _gather(ended: Iterable[Ended], outcome: Outcome, store: Store, listener: Listener) -> None:
    for cell, result, seconds in ended:
        failure = result if isinstance(result, Failure) else None
        if isinstance(result, Failure):
            outcome.failures.append(result)
        else:
            store.put(cell, result, seconds)
            outcome.results[cell.key] = result
        listener.done(cell, failure)


def _attempt(cell: Cell) -> Ended:
    start = time.perf_counter()
    result: Result | Failure
    try:
        result = cell.task(**cell.axes)
    except Exception as error:  # one cell's error, whatever it is, must not end the others
        reason = f"{type(error).__name__}: {error}"
        result = Failure(cell, reason, traceback.format_exc())
    return cell, result, time.perf_counter() - start


def _attempt_on_one_thread(cell: Cell) -> Ended:
    from evenkeel.lab.threads import one_thread

    with one_thread():
        return _attempt(cell)


def _in_parallel(cells: list[Cell], jobs: int) -> Iterator[Ended]:
    if jobs == 1 or len(cells) == 1:
        yield from map(_attempt_on_one_thread, cells)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import BrokenProcessPool

    left = {cell.key: cell for cell in cells}
    # One cell a batch: a batch is returned whole, and a kill would lose all of it.
    pool = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    attempt: Callable[[Cell], Ended] = _attempt_on_one_thread
    try:
        for ended in pool(delayed(attempt)(cell) for cell in cells):
            left.pop(ended[0].key)
            yield ended
    except BrokenProcessPool as error:
        # Which cell killed its process can't be told from outside.
        reason = f"a worker process died, with this cell running or waiting ({type(error).__name__})"
        for cell in left.values():
            yield cell, Failure(cell, f"{reason}; run again to go on", str(error)), 0.0
