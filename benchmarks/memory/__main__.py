"""Measure what `kn.save_memory` saves and costs: `python -m benchmarks.memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.architectures import ARCHITECTURES, require_packages
from benchmarks.memory.memory_markdown import page
from benchmarks.memory.memory_page import memory_document
from benchmarks.memory.memory_results import PARTS, MemoryReport, Settings
from benchmarks.memory.memory_run import run_memory
from benchmarks.memory.memory_store import new_report, stored_report
from benchmarks.memory.memory_table import print_memory
from keelnorm.cli._shared.bench_options import Many, Out, Threads, choose, deliver_result
from keelnorm.cli._shared.common_options import AsJson, page_path, writable_path
from keelnorm.engine.atomic_write import write_text
from keelnorm.measure.page.html import write_page

TIMED = ("step", "checkpoint")


def _html_path(path: Path | None) -> Path | None:
    return None if path is None else page_path(path)


def main(
    part: Annotated[Many, typer.Option(help=f"Only these of {', '.join(PARTS)}.")] = None,
    model: Annotated[Many, typer.Option(help="Only architectures whose name contains this.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples in the batch whose bytes are counted.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for the steps of a network in part step.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing at most; 0 times nothing.")] = 15,
    peak_batch: Annotated[int, typer.Option(min=2, help="Images in the batch whose peak is measured.")] = 32,
    limit: Annotated[float, typer.Option(min=0.5, help="Memory of a process for the largest batch, GiB.")] = 4.0,
    threads: Threads = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew, whatever --out holds.")] = False,
    stored: Annotated[
        Path | None,
        typer.Option("--from", exists=True, dir_okay=False, help="Measure nothing: print and draw this result."),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", callback=writable_path, help="Write the tables as a page of Markdown.")
    ] = None,
    html: Annotated[Path | None, typer.Option(callback=_html_path, help="Draw the result on a page of HTML.")] = None,
) -> None:
    """Measure what kn.save_memory saves and costs: bytes, steps, peaks, the largest batch, and checkpointing.

    With --out a run that was stopped goes on. Results with and without save_memory are first compared bit for bit.
    A wrong network gets no number, and the exit status is 1.
    """
    if stored is not None:
        report = _read(stored)
    else:
        names = [name for name in ARCHITECTURES if not model or any(each.lower() in name.lower() for each in model)]
        if not names:
            raise typer.BadParameter(f"there is none; known are {', '.join(ARCHITECTURES)}", param_hint="--model")
        require_packages(names)
        parts = choose("part", part, PARTS, PARTS)
        settings = Settings(batch, seconds, rounds, peak_batch, round(limit * 2**30), threads)
        report = _begun(settings, None if again else out)
        run_memory(
            report,
            names,
            [each for each in parts if rounds or each not in TIMED],
            store=lambda found: None if out is None else write_text(out, found.to_json() + "\n"),
        )
    try:
        deliver_result(report, out, print_memory, as_json=as_json)
    finally:
        if page_file is not None:
            write_text(page_file, page(report))
        if html is not None:
            write_page(memory_document(report), html, template="bench.html")
    if report.failed:
        raise typer.Exit(1)


def _begun(settings: Settings, out: Path | None) -> MemoryReport:
    """The report to go on with."""
    fresh = new_report(settings)
    if out is None:
        return fresh
    try:
        report, unlike = stored_report(out, fresh)
    except ValueError as error:
        raise typer.BadParameter(
            f"{out} can't be gone on with: {error}; --again measures anew, or name another file", param_hint="--out"
        ) from None
    if unlike:
        typer.echo(f"measuring anew: {out} is of another {', '.join(unlike)}", err=True)
    return report


def _read(path: Path) -> MemoryReport:
    try:
        return MemoryReport.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{path} is no result of this benchmark: {error}", param_hint="--from") from None


if __name__ == "__main__":
    typer.run(main)
