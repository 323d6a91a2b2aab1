"""Time every variant of batch normalization: `python -m benchmarks.variants`."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.variants.variant_layers import PLAIN, VARIANTS
from benchmarks.variants.variant_run import run_variants, selected
from benchmarks.variants.variant_table import print_variants
from keelnorm.bench.cases import DTYPES, LAYOUTS, shapes
from keelnorm.bench.results import Settings
from keelnorm.cli._shared.bench_options import (
    Many,
    MinTime,
    Out,
    Shape,
    Threads,
    choose,
    choose_pages,
    deliver_result,
    split_commas,
)
from keelnorm.cli._shared.common_options import AsJson


def main(
    variant: Annotated[Many, typer.Option(help=f"Only these of {'; '.join(VARIANTS)}; {PLAIN} always.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="N of ResNet-50's shapes.")] = 32,
    shape: Shape = None,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    dtype: Annotated[Many, typer.Option(help=f"These of {', '.join(DTYPES)}; float32 by default.")] = None,
    reuse_memory: Annotated[bool, typer.Option("--reuse-memory", help="Keep the memory of freed tensors.")] = False,
    threads: Threads = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each; 9, or 5 with --quick.")] = None,
    min_time: MinTime = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="Measure a few shapes only.")] = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time a training step of every variant of batch normalization against plain batch norm.

    A variant whose output or gradients are not finite or have the wrong shape gets no number, and the exit status is 1.
    """
    names = tuple(VARIANTS)
    settings = Settings(
        batch=batch,
        layouts=choose("layout", layout, LAYOUTS, LAYOUTS),
        variants=choose("variant", variant, names, names),
        modes=["both"],
        shapes=split_commas(shape),
        peers=["keelnorm"],
        rounds=rounds or (5 if quick else 9),
        min_time_ms=min_time,
        threads=threads,
        quick=quick,
        dtypes=choose("dtype", dtype, DTYPES, DTYPES[:1]),
        pages=choose_pages("reused" if reuse_memory else "fresh"),
    )
    if not selected(settings):
        known = ", ".join(one.name for one in shapes(batch, quick=quick))
        raise typer.BadParameter(
            f"nothing to measure in {' or '.join(settings.layouts)} layout; the shapes are {known}",
            param_hint="--shape",
        )
    report = run_variants(settings)
    deliver_result(report, out, print_variants, as_json=as_json)
    if report.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
