"""Convert and fold published architectures: `python -m benchmarks.zoo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.architectures import ARCHITECTURES, require_packages
from benchmarks.zoo.zoo_run import run_zoo
from benchmarks.zoo.zoo_table import page, print_zoo
from keelnorm.cli._shared.bench_options import Many, Out, Threads, deliver_result
from keelnorm.cli._shared.common_options import AsJson, writable_path
from keelnorm.engine.atomic_write import write_text


def main(
    model: Annotated[Many, typer.Option(help="Only architectures whose name contains this.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples in a batch that is timed.")] = 4,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing; 0 only checks.")] = 7,
    threads: Threads = None,
    as_json: AsJson = False,
    out: Out = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", callback=writable_path, help="Write the table as a page of Markdown.")
    ] = None,
) -> None:
    """Convert and fold published architectures: is the result right, what is fused, how much faster is it.

    Outputs and gradients are first compared in float64. A wrong architecture gets no time, and the exit status is 1.
    """
    wanted = [name for name in ARCHITECTURES if not model or any(part.lower() in name.lower() for part in model)]
    if not wanted:
        raise typer.BadParameter(f"there is none; known are {', '.join(ARCHITECTURES)}", param_hint="--model")
    require_packages(wanted)
    report = run_zoo(wanted, samples=batch, rounds=rounds, thread_count=threads)
    try:
        deliver_result(report, out, print_zoo, as_json=as_json)
    finally:
        if page_file is not None:
            write_text(page_file, page(report))
    if not all(row.is_right for row in report.rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
