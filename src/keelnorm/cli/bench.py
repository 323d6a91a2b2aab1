"""The command `keelnorm bench`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol, TypeAlias, TypeVar

import typer

from keelnorm.bench.cases import DTYPES, GRADIENTS, LAYOUTS, MODES, PAGES, VARIANTS, shapes
from keelnorm.engine.atomic_write import obstacle, write_text

Many = list[str] | None


def split(name: str, given: Many, legal: tuple[str, ...], default: tuple[str, ...]) -> list[str]:
    """Values of an option that may be repeated or joined by commas, in the order of `legal`."""
    values = {part.strip() for text in given or () for part in text.split(",") if part.strip()}
    unknown = sorted(values - set(legal))
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; legal are {', '.join(legal)}", param_hint=f"--{name}")
    return [one for one in legal if one in (values or default)]


def possible_pages(asked: list[str]) -> list[str]:
    """What can be had of the asked page settings; says what can't, and why."""
    from keelnorm.bench.layer_run import page_settings
    from keelnorm.memory import obstacle

    try:
        found = page_settings(asked)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--pages") from None
    if found != asked:
        typer.echo(f"measured with fresh pages only, memory cannot be reused here: {obstacle()}", err=True)
    return found


def result_path(path: Path | None) -> Path | None:
    """A path where a result can be written."""
    if path is not None and (why_not := obstacle(path)):
        raise typer.BadParameter(why_not)
    return path


Out: TypeAlias = Annotated[Path | None, typer.Option("--out", callback=result_path, help="Write JSON to this file.")]
R = TypeVar("R", bound="HasJson")


class HasJson(Protocol):
    """A result."""

    def to_json(self) -> str:
        """The result as JSON text."""


def leave(report: R, out: Path | None, as_json: bool, show: Callable[[R], None]) -> None:
    """Print a result, as JSON or as `show` does, and write it to a file; where one fails, still the other."""
    try:
        if as_json:
            typer.echo(report.to_json())
        else:
            show(report)
    finally:
        if out is not None:
            write_text(out, report.to_json() + "\n")


def bench_command(
    batch: Annotated[int, typer.Option(min=1, help="N of ResNet-50's shapes.")] = 32,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    variant: Annotated[Many, typer.Option(help=f"Only these of {', '.join(VARIANTS)}.")] = None,
    mode: Annotated[Many, typer.Option(help=f"Only these of {', '.join(MODES)}.")] = None,
    shape: Annotated[
        Many,
        typer.Option(help="Only shapes whose NxCxHxW or suite (resnet50, small) contains this."),
    ] = None,
    gradient: Annotated[
        Many, typer.Option(help=f"How the gradient arrives: these of {', '.join(GRADIENTS)}; matching by default.")
    ] = None,
    dtype: Annotated[Many, typer.Option(help=f"These of {', '.join(DTYPES)}; float32 by default.")] = None,
    pages: Annotated[
        str, typer.Option(help="Memory of large tensors: fresh (the allocator's default), reused, or both.")
    ] = "fresh",
    reuse_memory: Annotated[bool, typer.Option("--reuse-memory", help="The same as --pages reused.")] = False,
    peers: Annotated[
        Many, typer.Option(help="Only these of keelnorm, eager, compile, onednn, relu, copy, clone.")
    ] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Measure torch.compile too; slow to start."),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to use; torch's choice if not given.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of every peer; 9, or 5 with --quick.")] = None,
    min_time: Annotated[float, typer.Option(min=0.0, help="Least time of a sample, ms.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    out: Out = None,
) -> None:
    """Time batch norm, alone and with add and ReLU, against torch and against a plain copy.

    Every result is compared with a float64 definition first; a wrong one gets no number, and the
    exit status is 1.
    """
    from keelnorm.bench.peers import DEFAULT_PEERS, PEERS
    from keelnorm.bench.results import Settings
    from keelnorm.bench.layer_run import run_bench, selected
    from keelnorm.bench.result_table import print_report

    asked = ["reused"] if reuse_memory else [",".join(PAGES) if pages == "both" else pages]
    names = split("peers", peers, tuple(PEERS), DEFAULT_PEERS)
    if compile_ and "compile" not in names:
        names = [name for name in PEERS if name in names or name == "compile"]
    settings = Settings(
        batch=batch,
        layouts=split("layout", layout, LAYOUTS, LAYOUTS),
        variants=split("variant", variant, VARIANTS, VARIANTS),
        modes=split("mode", mode, MODES, MODES),
        shapes=[part for text in shape or () for part in text.split(",")],
        peers=names,
        rounds=rounds or (5 if quick else 9),
        min_time_ms=min_time,
        threads=threads,
        quick=quick,
        gradients=split("gradient", gradient, GRADIENTS, GRADIENTS[:1]),
        dtypes=split("dtype", dtype, DTYPES, DTYPES[:1]),
        pages=possible_pages(split("pages", asked, PAGES, PAGES[:1])),
    )
    if not selected(settings):
        known = ", ".join(one.name for one in shapes(batch, quick=quick))
        raise typer.BadParameter(
            f"nothing to measure: no shape in {' or '.join(settings.layouts)} layout contains "
            f"{' or '.join(settings.shapes)}; the shapes are {known}",
            param_hint="--shape",
        )
    report = run_bench(settings)
    leave(report, out, as_json, print_report)
    if report.errors:
        raise typer.Exit(1)
