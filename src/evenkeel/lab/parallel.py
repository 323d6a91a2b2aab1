"""Many cells beside each other, through joblib: processes of this machine, or the caller's own cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from evenkeel.lab.cell import Cell, Ended, Failure
from evenkeel.machine import cores

Attempt = Callable[[Cell], Ended]


def in_parallel(cells: list[Cell], attempt: Attempt, jobs: int | None) -> Iterator[Ended]:
    """Run the cells and yield each as it ends.

    A worker process that dies takes only its own cell with it: the others run on in new processes.

    Args:
        cells: the work, in the order to begin it.
        attempt: runs one cell and never raises.
        jobs: how many beside each other; None: one a core, or all that the caller's cluster has.
    """
    if jobs == 1 or (len(cells) == 1 and not _elsewhere()):
        yield from map(attempt, cells)
        return
    from joblib.externals.loky.process_executor import BrokenProcessPool

    left = {cell.key: cell for cell in cells}
    while left:
        try:
            for ended in _pooled(list(left.values()), attempt, jobs):
                del left[ended[0].key]
                yield ended
        except BrokenProcessPool:
            # Which cell killed its process can't be told from outside: each of those that were in hand runs alone.
            yield from _one_by_one(left, attempt, _width(jobs))


def _one_by_one(left: dict[str, Cell], attempt: Attempt, most: int) -> Iterator[Ended]:
    """Run cells in a process each until one dies again, or as many as were in hand are done."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    for cell in list(left.values())[:most]:
        del left[cell.key]
        try:
            # Two jobs, since one would run in this very process.
            yield from _pooled([cell], attempt, 2)
        except BrokenProcessPool as error:
            reason = "its worker process died: the system may have killed it, as for want of memory"
            yield cell, Failure(cell, reason, str(error)), 0.0


def _pooled(cells: list[Cell], attempt: Attempt, jobs: int | None) -> Iterator[Ended]:
    from joblib import Parallel, delayed

    # One cell a batch: a batch is returned whole, and a kill would lose all of it. Twice as many as run are handed
    # out, so that after a death few are in doubt.
    width = -1 if jobs is None and _elsewhere() else _width(jobs)
    pool = Parallel(n_jobs=width, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
    yield from pool(delayed(attempt)(cell) for cell in cells)


def _width(jobs: int | None) -> int:
    return cores() if jobs is None else jobs


def _elsewhere() -> bool:
    """Whether the caller has set a joblib backend other than processes of this machine."""
    from joblib.parallel import get_active_backend

    backend, _ = get_active_backend()
    return type(backend).__name__ != "LokyBackend"


def cluster(address: str | None) -> AbstractContextManager[Any]:
    """Inside, cells run on the cluster at this address; None: on this machine.

    Args:
        address: a Dask scheduler's ("tcp://host:8786") or a Ray head's ("ray://host:10001").

    Raises:
        ValueError: when the address is neither, or nothing answers there.
        ModuleNotFoundError: when the package that speaks to such a cluster is missing.
    """
    if address is None:
        return nullcontext()
    from joblib import parallel_config

    if address.startswith("ray://"):
        _need("ray", "pip install ray")
        import ray
        from ray.util.joblib import register_ray

        ray.init(address=address)
        register_ray()
        context: AbstractContextManager[Any] = parallel_config(backend="ray")
        return context
    if not address.startswith(("tcp://", "tls://")):
        raise ValueError(
            f"a cluster's address is that of a Dask scheduler (tcp://host:8786) or of a Ray head (ray://host:10001); "
            f"got {address!r}"
        )
    _need("distributed", "pip install 'evenkeel[dask]'")
    from distributed import Client

    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except OSError as error:
        raise ValueError(f"no Dask scheduler answers at {address} ({error}); is it running, and reachable?") from None
    return _on_dask(client)


def _need(package: str, how: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"such a cluster needs the package {package}: {how}", name=package)


@contextmanager
def _on_dask(client: Any) -> Iterator[None]:
    from joblib import parallel_config

    with client, parallel_config(backend="dask", client=client):
        yield
