"""Cells in parallel: in processes of this machine, or on a cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any

from keelnorm.lab.core.cell import Cell, Ended, Failure
from keelnorm.measure.machine import cores

Attempt = Callable[[Cell], Ended]
Pool = Callable[[list[Cell], Attempt, int | None], Iterator[Ended]]
"""Runs cells in parallel, at most as many at once as the number says, and yields each as it ends."""

DIED = "its worker process died; the system may have killed it, for example for lack of memory"
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}

_elsewhere: Pool | None = None


@contextmanager
def running_on(pool: Pool) -> Iterator[None]:
    """Run cells in this pool inside the block, not on this machine."""
    global _elsewhere
    before, _elsewhere = _elsewhere, pool
    try:
        yield
    finally:
        _elsewhere = before


def in_parallel(cells: list[Cell], attempt: Attempt, jobs: int | None) -> Iterator[Ended]:
    """Run the cells and yield each as it ends.

    A worker process that dies takes only its own cell with it: the others run on in new processes. Workers end with
    this process, however it ends.

    Args:
        cells: the work, in the order to begin it.
        attempt: runs one cell and never raises.
        jobs: how many at once; None: one a core, or as many as the cluster has workers for.
    """
    if _elsewhere is not None:
        yield from _elsewhere(cells, attempt, jobs)
        return
    from joblib.parallel import get_active_backend

    backend, _ = get_active_backend()
    if type(backend).__name__ != "LokyBackend":  # the caller's own
        yield from _through_joblib(cells, attempt, jobs, backend)
        return
    width = cores() if jobs is None else jobs
    if width == 1 or len(cells) == 1:
        yield from map(attempt, cells)
        return
    from joblib.externals.loky.process_executor import BrokenProcessPool

    left = {cell.key: cell for cell in cells}
    in_hand = 2 * width  # the next cell lies ready for each process, and after a death few are in doubt
    while left:
        try:
            for ended in _in_processes(list(left.values()), attempt, width, in_hand):
                del left[ended[0].key]
                yield ended
        except BrokenProcessPool:
            # Which cell killed its process can't be told from outside: each of those that were in hand runs alone.
            yield from _one_by_one(left, attempt, width, in_hand)


def _through_joblib(cells: list[Cell], attempt: Attempt, jobs: int | None, backend: Any) -> Iterator[Ended]:
    from joblib import Parallel, delayed

    # One cell a batch: a batch is returned whole, and a kill would lose all of it.
    as_they_end = "generator_unordered" if getattr(backend, "supports_return_generator", False) else "list"
    pool = Parallel(n_jobs=jobs or -1, return_as=as_they_end, batch_size=1, pre_dispatch="n_jobs")
    yield from pool(delayed(attempt)(cell) for cell in cells)


def handed_out(
    cells: Iterable[Cell], submit: Callable[[Cell], Any], first_done: Callable[[list[Any]], Iterable[Any]], most: int
) -> Iterator[tuple[Cell, Any]]:
    """Hand out cells, and yield each with its handle when it is done.

    Args:
        cells: the work, in the order to begin it.
        submit: starts a cell and returns a handle.
        first_done: waits for some of these handles and returns those that are done.
        most: how many cells are out at once.
    """
    rest = iter(cells)
    hand = {submit(cell): cell for cell in islice(rest, most)}
    while hand:
        for handle in first_done(list(hand)):
            cell = hand.pop(handle)
            for following in islice(rest, 1):
                hand[submit(following)] = following
            yield cell, handle


def _one_by_one(left: dict[str, Cell], attempt: Attempt, width: int, most: int) -> Iterator[Ended]:
    """Run each cell in a process of its own, until one dies again or all that may have killed it are done."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    for cell in list(left.values())[:most]:
        del left[cell.key]
        try:
            yield from _in_processes([cell], attempt, width, 1)
        except BrokenProcessPool as error:
            yield cell, Failure(cell, DIED, str(error)), 0.0


def _in_processes(cells: list[Cell], attempt: Attempt, width: int, most: int) -> Iterator[Ended]:
    from multiprocessing import resource_tracker

    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.backend import resource_tracker as lokys

    # Both would be started with the first worker, and Python's lets interrupts through again when it is.
    resource_tracker.ensure_running()
    lokys.ensure_running()
    # Its workers wait for what comes next, since starting one takes as long as many a cell.
    pool = get_reusable_executor(width, initializer=end_with_parent, initargs=(os.getpid(),), env=ONE_THREAD)

    def submit(cell: Cell) -> Any:
        with _without_interrupts():  # this starts processes
            return pool.submit(attempt, cell)

    finished = False
    try:
        for _, future in handed_out(cells, submit, lambda some: wait(some, return_when=FIRST_COMPLETED).done, most):
            yield future.result()
        finished = True
    finally:
        if not finished:
            pool.shutdown(kill_workers=True)


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, even if that was killed; it would wait for work for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block Ctrl-C inside, so that workers started there ignore it.

    A terminal sends it to the workers too, which end with this process anyway. Here it arrives a little later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
