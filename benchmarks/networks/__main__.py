"""The command `keelnorm bench networks`."""

from typing import Annotated

import typer

from keelnorm.bench.cases import LAYOUTS, PAGES
from keelnorm.bench.command import Many, Out, leave, possible_pages, split
from benchmarks.networks.networks import NETWORKS
from keelnorm.engine.optional_imports import lacking

STEPS = ("training", "inference")


def networks_command(
    network: Annotated[Many, typer.Option(help=f"Only these of {', '.join(NETWORKS)}.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    size: Annotated[int, typer.Option(min=32, help="Height and width of an image.")] = 224,
    mode: Annotated[Many, typer.Option(help=f"Only these of {', '.join(STEPS)}.")] = None,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    pages: Annotated[
        str, typer.Option(help="Memory of large tensors: fresh (the allocator's default), reused, or both.")
    ] = "both",
    reuse_memory: Annotated[bool, typer.Option("--reuse-memory", help="The same as --pages reused.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of every arm that are timed.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to use; torch's choice if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    out: Out = None,
) -> None:
    """Time whole training steps and inference of real networks, with keelnorm's layers and with torch's.

    Outputs, gradients and running statistics are compared with float64 first; a wrong network gets no
    number, and the exit status is 1.
    """
    if words := lacking("bench", "pytorchcv"):
        typer.echo(f"the networks need {words}", err=True)
        raise typer.Exit(1)
    from benchmarks.networks.network_run import run_networks
    from benchmarks.networks.network_table import print_networks
    from keelnorm.bench.results import Settings

    asked = ["reused"] if reuse_memory else [",".join(PAGES) if pages == "both" else pages]
    settings = Settings(
        batch=batch,
        layouts=split("layout", layout, LAYOUTS, LAYOUTS),
        variants=[],
        modes=split("mode", mode, STEPS, STEPS),
        shapes=[],
        peers=["keelnorm", "eager"],
        rounds=rounds,
        min_time_ms=0.0,
        threads=threads,
        pages=possible_pages(split("pages", asked, PAGES, PAGES)),
    )
    names = tuple(NETWORKS)
    report = run_networks(settings, split("network", network, names, names), size)
    leave(report, out, as_json, print_networks)
    if report.failed:
        raise typer.Exit(1)
