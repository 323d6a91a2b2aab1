"""The command `keelnorm bench variants`."""

from typing import Annotated

import typer

from keelnorm.bench.cases import DTYPES, LAYOUTS, shapes
from keelnorm.bench.command import Many, Out, leave, possible_pages, split
from benchmarks.variants.variant_layers import PLAIN, VARIANTS


def variants_command(
    variant: Annotated[Many, typer.Option(help=f"Only these of {'; '.join(VARIANTS)}; {PLAIN} always.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="N of ResNet-50's shapes.")] = 32,
    shape: Annotated[
        Many, typer.Option(help="Only shapes whose NxCxHxW or suite (resnet50, small) contains this.")
    ] = None,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    dtype: Annotated[Many, typer.Option(help=f"These of {', '.join(DTYPES)}; float32 by default.")] = None,
    reuse_memory: Annotated[bool, typer.Option("--reuse-memory", help="Keep the memory of freed tensors.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to use; torch's choice if not given.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each; 9, or 5 with --quick.")] = None,
    min_time: Annotated[float, typer.Option(min=0.0, help="Least time of a sample, ms.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    out: Out = None,
) -> None:
    """Time a training step of every variant of batch normalization against plain batch norm's.

    A variant whose output or gradients are not finite or not of the right shape gets no number, and the exit
    status is 1.
    """
    from keelnorm.bench.results import Settings
    from benchmarks.variants.variant_run import run_variants, selected
    from benchmarks.variants.variant_table import print_variants

    names = tuple(VARIANTS)
    settings = Settings(
        batch=batch,
        layouts=split("layout", layout, LAYOUTS, LAYOUTS),
        variants=split("variant", variant, names, names),
        modes=["both"],
        shapes=[part for text in shape or () for part in text.split(",")],
        peers=["keelnorm"],
        rounds=rounds or (5 if quick else 9),
        min_time_ms=min_time,
        threads=threads,
        quick=quick,
        dtypes=split("dtype", dtype, DTYPES, DTYPES[:1]),
        pages=possible_pages(["reused" if reuse_memory else "fresh"]),
    )
    if not selected(settings):
        known = ", ".join(one.name for one in shapes(batch, quick=quick))
        raise typer.BadParameter(
            f"nothing to measure in {' or '.join(settings.layouts)} layout; the shapes are {known}",
            param_hint="--shape",
        )
    report = run_variants(settings)
    leave(report, out, as_json, print_variants)
    if report.failed:
        raise typer.Exit(1)
