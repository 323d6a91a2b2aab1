"""The command `keelnorm bench models`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from keelnorm.bench.command import Many, Out, leave, result_path
from keelnorm.engine.atomic_write import write_text


def models_command(
    model: Annotated[Many, typer.Option(help="Only architectures whose name contains this.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples in a batch that is timed.")] = 4,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing; 0 checks alone.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to use; torch's choice if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    out: Out = None,
    page: Annotated[
        Path | None, typer.Option(callback=result_path, help="Write the table as a page of Markdown.")
    ] = None,
) -> None:
    """Convert and fold published architectures: is the result right, what is fused, what does it bring.

    Outputs and gradients are compared in float64 first; a wrong one gets no time, and the exit status is 1.
    """
    missing = [name for name in ("pytorchcv", "transformers", "monai") if find_spec(name) is None]
    if missing:
        typer.echo(f"the architectures come from packages that are missing: pip install {' '.join(missing)}", err=True)
        raise typer.Exit(1)
    from benchmarks.zoo.zoo_run import run_models
    from benchmarks.zoo.zoo_table import page as page_of
    from benchmarks.zoo.zoo_table import print_models
    from benchmarks.architectures import ARCHITECTURES

    wanted = [name for name in ARCHITECTURES if not model or any(part.lower() in name.lower() for part in model)]
    if not wanted:
        raise typer.BadParameter(f"there is none; known are {', '.join(ARCHITECTURES)}", param_hint="--model")
    report = run_models(wanted, samples=batch, rounds=rounds, threads=threads)
    try:
        leave(report, out, as_json, print_models)
    finally:
        if page is not None:
            write_text(page, page_of(report))
    if not all(row.is_right for row in report.rows):
        raise typer.Exit(1)
