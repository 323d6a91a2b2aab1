"""Time whole training steps and inference of networks: `python -m benchmarks.networks`."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.architectures import require_packages
from benchmarks.networks.network_cases import NETWORKS
from benchmarks.networks.network_run import run_networks
from benchmarks.networks.network_table import print_networks
from keelnorm.bench.cases import LAYOUTS
from keelnorm.bench.results import Settings
from keelnorm.cli._shared.bench_options import Many, Out, Pages, Threads, choose, choose_pages, deliver_result
from keelnorm.cli._shared.common_options import AsJson

STEPS = ("training", "inference")


def main(
    network: Annotated[Many, typer.Option(help=f"Only these of {', '.join(NETWORKS)}.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    size: Annotated[int, typer.Option(min=32, help="Height and width of an image.")] = 224,
    mode: Annotated[Many, typer.Option(help=f"Only these of {', '.join(STEPS)}.")] = None,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    pages: Pages = "both",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of every arm that are timed.")] = 5,
    threads: Threads = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time whole training steps and inference of real networks, as they are and converted by kn.convert.

    Outputs, gradients and running statistics are first compared with float64.
    A wrong network gets no number, and the exit status is 1.
    """
    names = choose("network", network, NETWORKS, NETWORKS)
    require_packages(names)
    settings = Settings(
        batch=batch,
        layouts=choose("layout", layout, LAYOUTS, LAYOUTS),
        variants=[],
        modes=choose("mode", mode, STEPS, STEPS),
        shapes=[],
        peers=["keelnorm", "eager"],
        rounds=rounds,
        min_time_ms=0.0,
        threads=threads,
        pages=choose_pages(pages),
    )
    report = run_networks(settings, names, size)
    deliver_result(report, out, print_networks, as_json=as_json)
    if report.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
