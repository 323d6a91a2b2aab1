"""The command `evenkeel bench`."""

from pathlib import Path
from typing import Annotated

import typer

from .cases import LAYOUTS, MODES, VARIANTS, shapes

Many = list[str] | None


def _split(name: str, given: Many, legal: tuple[str, ...], default: tuple[str, ...]) -> list[str]:
    """Values of an option that may be repeated or joined by commas, in the order of `legal`."""
    values = {part.strip() for text in given or () for part in text.split(",") if part.strip()}
    unknown = sorted(values - set(legal))
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; legal are {', '.join(legal)}", param_hint=f"--{name}")
    return [one for one in legal if one in (values or default)]


def bench_command(
    batch: Annotated[int, typer.Option(min=1, help="N of ResNet-50's shapes.")] = 32,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    variant: Annotated[Many, typer.Option(help=f"Only these of {', '.join(VARIANTS)}.")] = None,
    mode: Annotated[Many, typer.Option(help=f"Only these of {', '.join(MODES)}.")] = None,
    shape: Annotated[
        Many,
        typer.Option(help="Only shapes whose NxCxHxW or suite (resnet50, small) contains this."),
    ] = None,
    peers: Annotated[Many, typer.Option(help="Only these of evenkeel, eager, compile, relu, copy, clone.")] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Measure torch.compile too; slow to start."),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to use; torch's choice if not given.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of every peer; 9, or 5 with --quick.")] = None,
    min_time: Annotated[float, typer.Option(min=0.0, help="Least time of a sample, ms.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write JSON to this file.")] = None,
) -> None:
    """Time batch norm, alone and with add and ReLU, against torch and against a plain copy.

    Every result is compared with a float64 definition first; a wrong one gets no number, and the
    exit status is 1.
    """
    from .peers import DEFAULT_PEERS, PEERS
    from .results import Settings
    from .run import run_bench, selected
    from .table import print_report

    names = _split("peers", peers, tuple(PEERS), DEFAULT_PEERS)
    if compile_ and "compile" not in names:
        names = [name for name in PEERS if name in names or name == "compile"]
    settings = Settings(
        batch=batch,
        layouts=_split("layout", layout, LAYOUTS, LAYOUTS),
        variants=_split("variant", variant, VARIANTS, VARIANTS),
        modes=_split("mode", mode, MODES, MODES),
        shapes=[part for text in shape or () for part in text.split(",")],
        peers=names,
        rounds=rounds or (5 if quick else 9),
        min_time_ms=min_time,
        threads=threads,
        quick=quick,
    )
    if not selected(settings):
        known = ", ".join(one.name for one in shapes(batch, quick=quick))
        raise typer.BadParameter(
            f"nothing to measure: no shape in {' or '.join(settings.layouts)} layout contains "
            f"{' or '.join(settings.shapes)}; the shapes are {known}",
            param_hint="--shape",
        )
    report = run_bench(settings)
    if out is not None:
        out.write_text(report.to_json() + "\n", encoding="utf-8")
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(report)
    if report.errors:
        raise typer.Exit(1)
