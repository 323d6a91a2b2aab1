"""A progress bar for a run, on the standard error stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from keelnorm.lab.core.cell import Cell, Failure


class ProgressBar:
    """Shows cells done, time gone and time left; names a cell that fails at once.

    A stream that can't be written to costs the bar, not the run.

    Cells that run alone get a bar of their own that is drawn between cells only: a thread that draws
    would share the machine with what is measured.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._done = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            with suppress(OSError):
                progress.stop()

    def begin(self, cells: list[Cell], *, alone: bool) -> None:
        """Start a bar for these cells, weighed by their cost."""
        self._stop()
        self._done = 0
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[cells]} cells"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=not alone,
            refresh_per_second=4,
            # The standard output is the results' alone.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(
            "timing" if alone else "training",
            total=sum(cell.cost for cell in cells),
            done=0,
            cells=len(cells),
        )
        self._draw(self._progress.start)

    def done(self, cell: Cell, failure: Failure | None) -> None:
        """Move the bar on."""
        if self._progress is None:
            return
        self._done += 1
        self._progress.update(self._task, advance=cell.cost, done=self._done)
        self._draw(self._progress.refresh)
        if failure is not None:
            said = f"failed: {cell.label()}: {failure.reason}"
            self._draw(lambda: self._console.print(said, markup=False))

    def _draw(self, draw: Callable[[], None]) -> None:
        try:
            draw()
        except OSError:
            self._stop()
