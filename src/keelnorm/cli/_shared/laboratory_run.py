"""Run an order of the laboratory with a progress bar, write its page and print it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from keelnorm.cli._shared.exit_status import describe_system_error, status_of
from keelnorm.cli._shared.failures import CommandError

if TYPE_CHECKING:
    from keelnorm.lab.core.laboratory import Order
    from keelnorm.lab.core.store import Store

PACKAGES = ("joblib", "sklearn", "scipy", "plotly", "jinja2")
"""The packages of the extra [lab]."""


def opened(page: Path, *, fresh: bool = False) -> Store:
    """Open the results beside a page, and print warnings about them on the standard error stream."""
    from keelnorm.lab.core.laboratory import results_beside
    from keelnorm.lab.core.store import Store

    store = Store(results_beside(page), reuse=not fresh)
    for warning in store.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return store


def measure(
    order: Order,
    page: Path,
    *,
    jobs: int | None,
    fresh: bool,
    as_json: bool,
    around: AbstractContextManager[Any] | None = None,
) -> None:
    """Run an order, write its page and print the document; exit status 1 when a cell failed.

    Args:
        order: What to measure.
        page: The file of the page.
        jobs: Parallel processes; None: one per core.
        fresh: Ignore stored results.
        as_json: Print JSON.
        around: A context manager that is entered for the run: a cluster, or the reuse of memory.
    """
    from keelnorm.lab.core.clusters import ClusterError
    from keelnorm.lab.core.laboratory import run_order
    from keelnorm.lab.core.progress import ProgressBar

    store = opened(page, fresh=fresh)
    kept = f"what was measured is kept in {store.path}, and the same command goes on"
    try:
        with around or nullcontext(), ProgressBar(Console(stderr=True)) as bar:
            document = run_order(order, store, jobs=jobs, listener=bar)
    except KeyboardInterrupt as stop:
        raise CommandError(f"stopped; {kept}", status_of(stop)) from None
    except OSError as error:
        raise CommandError(f"{describe_system_error(error)}; {kept}") from None
    except ClusterError as error:
        raise CommandError(f"{error}; {kept}") from None
    deliver(document, page, store, as_json=as_json)
    if document["run"]["failed"]:
        raise CommandError(f"{document['run']['failed']} of {document['run']['cells']} cells failed")


def deliver(document: dict[str, Any], page: Path, store: Store, *, as_json: bool) -> None:
    """Write the page of a document, and print it as text or JSON; if one of the two fails, still do the other."""
    from keelnorm.measure.page.html import write_page
    from keelnorm.measure.page.terminal import show

    document["files"] = {"page": str(page), "results": str(store.path)}
    try:
        write_page(document, page)
    finally:
        if as_json:
            typer.echo(json.dumps(document, allow_nan=False))
        else:
            show(document, Console())
