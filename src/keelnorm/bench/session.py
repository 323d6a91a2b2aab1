"""What every benchmark run needs: threads, allocator, a progress bar, and failures that cost only their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keelnorm import memory
from keelnorm.bench.cases import PAGES
from keelnorm.bench.peers import CannotError

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a row has no number: `error` after a mistake, `skipped` where a peer does not do such a case."""

    error: str | None = None
    skipped: str | None = None


def attempt(action: Callable[[], T]) -> T | Failure:
    """Run an action. If it raises, the failure costs its rows and not the run."""
    try:
        return action()
    except CannotError as error:
        return Failure(skipped=str(error))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Failure(error=f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def page_settings(asked: Sequence[str]) -> list[str]:
    """Those of the asked page settings that are possible here, fresh first; see `cases.PAGES`.

    Raises:
        RuntimeError: None of them is possible.
    """
    possible = [pages for pages in PAGES if pages in asked and (pages == "fresh" or memory.obstacle() is None)]
    if not possible:
        raise RuntimeError(f"memory cannot be reused here: {memory.obstacle()}")
    return possible


@contextmanager
def allocator(pages: str) -> Iterator[None]:
    """Inside, the allocator works as the page setting says."""
    if pages == "reused":
        with memory.reuse_memory():
            yield
    else:
        yield


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch uses so many threads; None leaves its own choice."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def progress_bar(enabled: bool) -> Progress:
    """A progress bar on the standard error stream."""
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        disable=not enabled,
    )
