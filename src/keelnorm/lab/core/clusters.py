"""Cells on a Dask or a Ray cluster."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from keelnorm.engine.optional_imports import lacking
from keelnorm.lab.core.cell import Cell, Ended, Failure
from keelnorm.lab.core.parallel import DIED, Attempt, handed_out, running_on

SECONDS = 10
"""How long to wait for an answer, and for a worker."""
LEAST_IN_HAND = 64
"""How many cells are handed out at once, even while there are few workers."""


class ClusterError(ValueError):
    """A cluster that does not answer, has no workers, or was lost: which one, what is wrong, what to do."""


def cluster(address: str | None) -> AbstractContextManager[Any]:
    """Run cells on the cluster at this address inside the block; on this machine where it is None.

    Args:
        address: a Dask scheduler's ("tcp://host:8786") or a Ray head's ("ray://host:10001").

    Raises:
        ValueError: when the address is neither; as ClusterError when nothing answers there, or without workers.
        ModuleNotFoundError: when the package that speaks to such a cluster is missing.
    """
    if address is None:
        return nullcontext()
    if address.startswith("ray://"):
        _require("ray", "ray")
        return _on_ray(address, _connected_to_ray(address))
    if not address.startswith(("tcp://", "tls://")):
        raise ValueError(
            "a cluster's address is that of a Dask scheduler (tcp://host:8786) or of a Ray head (ray://host:10001); "
            f"got {address!r}"
        )
    _require("dask", "distributed")
    return _on_dask(address, _connected_to_dask(address))


def _require(extra: str, package: str) -> None:
    if words := lacking(extra, package):
        raise ModuleNotFoundError(f"such a cluster needs the package {words}", name=package)


def _failure(cell: Cell, error: Exception) -> Ended:
    return cell, Failure(cell, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", str(error)), 0.0


def _check_reachable(kind: str, address: str, usual: int) -> None:
    """Raise unless something listens at this address: the packages themselves would try for long."""
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname or "", place.port or usual), SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"no {kind} answers at {address} ({error}); is it running, and reachable?") from None


def _without_workers(kind: str, address: str) -> ClusterError:
    return ClusterError(f"{kind} at {address} answers, but has no workers; start some, and run this again")


# ---- Dask


def _connected_to_dask(address: str) -> Any:
    from distributed import Client

    _check_reachable("Dask scheduler", address, 8786)
    try:
        client = Client(address, timeout=SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address} ({error}); is it running, and reachable?") from None
    try:
        client.wait_for_workers(1, timeout=SECONDS)
    except TimeoutError:
        client.close()
        raise _without_workers("the Dask scheduler", address) from None
    return client


@contextmanager
def _on_dask(address: str, client: Any) -> Iterator[None]:
    with client, running_on(partial(_through_dask, address, client)):
        yield


def _through_dask(address: str, client: Any, cells: list[Cell], attempt: Attempt, jobs: int | None) -> Iterator[Ended]:
    from distributed import wait
    from distributed.scheduler import KilledWorker

    def first_done(futures: list[Any]) -> Iterable[Any]:
        while True:
            try:
                with client.as_current():
                    return wait(futures, timeout=SECONDS, return_when="FIRST_COMPLETED").done  # type: ignore[no-any-return]
            except TimeoutError:
                if client.status == "running" and not client.nthreads():
                    raise _without_workers("the Dask scheduler", address) from None

    most = jobs or max(LEAST_IN_HAND, 2 * sum(client.nthreads().values()))
    doubtful: list[Cell] = []  # Dask blames all that a worker had in hand when it died: each of these runs alone
    for again in (False, True):
        todo, in_hand = (doubtful, 1) if again else (cells, most)
        for cell, future in handed_out(todo, partial(client.submit, attempt, pure=False), first_done, in_hand):
            if future.status == "cancelled":
                raise ClusterError(f"the Dask scheduler at {address} no longer answers")
            try:
                ended = future.result()
            except KilledWorker as error:
                if not again:
                    doubtful.append(cell)
                    continue
                ended = cell, Failure(cell, DIED, str(error)), 0.0
            except Exception as error:  # of the worker's, as where keelnorm is not installed there: the others run on
                ended = _failure(cell, error)
            yield ended


# ---- Ray


def _connected_to_ray(address: str) -> Any:
    """Connect, and return Ray's module."""
    _check_reachable("Ray head", address, 10001)
    import ray

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    except Exception as error:  # another version, no Ray at all: each its own type
        said = " ".join(str(error).split())[:500]
        raise ClusterError(f"what answers at {address} can't be used as a Ray head: {said}") from None
    if not _ray_cores(ray):
        ray.shutdown()
        raise _without_workers("the Ray head", address)
    return ray


def _ray_cores(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 0))


@contextmanager
def _on_ray(address: str, ray: Any) -> Iterator[None]:
    try:
        with running_on(partial(_through_ray, address, ray)):
            yield
    finally:
        ray.shutdown()


def _through_ray(address: str, ray: Any, cells: list[Cell], attempt: Attempt, jobs: int | None) -> Iterator[Ended]:
    """Each cell is a task of its own, on one core, which is not tried again."""
    errors = ray.exceptions
    task = ray.remote(num_cpus=1, max_retries=0)(_attempted)

    def first_done(handles: list[Any]) -> Iterable[Any]:
        while True:
            done, _ = ray.wait(handles, timeout=SECONDS)
            if done:
                return done  # type: ignore[no-any-return]
            if not _ray_cores(ray):
                raise _without_workers("the Ray head", address)

    most = jobs or max(LEAST_IN_HAND, 2 * _ray_cores(ray))
    try:
        for cell, handle in handed_out(cells, partial(task.remote, attempt), first_done, most):
            try:
                ended = ray.get(handle)
            except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
                ended = cell, Failure(cell, DIED, str(error)), 0.0
            except errors.RayTaskError as error:  # as where keelnorm is not installed there: the others run on
                ended = _failure(cell, error)
            yield ended
    except (ConnectionError, errors.RayError) as error:
        said = " ".join(str(error).split())[:200]
        raise ClusterError(f"the Ray head at {address} no longer answers ({said})") from None


def _attempted(attempt: Attempt, cell: Cell) -> Ended:
    return attempt(cell)
