"""The command `keelnorm bench`: time layers, compare results, draw them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from keelnorm.bench.cases import DTYPES, GRADIENTS, LAYOUTS, MODES, VARIANTS, shapes
from keelnorm.cli._shared.bench_options import (
    Many,
    MinTime,
    Out,
    Pages,
    Shape,
    Threads,
    choose,
    choose_pages,
    deliver_result,
    split_commas,
)
from keelnorm.cli._shared.common_options import AsJson, page_path
from keelnorm.cli._shared.failures import CommandError, need

if TYPE_CHECKING:
    from keelnorm.bench.results import Report


class RunByDefault(TyperGroup):
    """A group that takes options without a command as those of `run`."""

    # The types are those of whichever click typer brings along.
    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Put `run` where no command is named."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=RunByDefault, help="Time batch norm layers (`run`, the default), compare results, draw them."
)


@bench_app.command("run")
def run_command(
    batch: Annotated[int, typer.Option(min=1, help="N of ResNet-50's shapes.")] = 32,
    layout: Annotated[Many, typer.Option(help=f"Only these of {', '.join(LAYOUTS)}.")] = None,
    variant: Annotated[Many, typer.Option(help=f"Only these of {', '.join(VARIANTS)}.")] = None,
    mode: Annotated[Many, typer.Option(help=f"Only these of {', '.join(MODES)}.")] = None,
    shape: Shape = None,
    gradient: Annotated[
        Many, typer.Option(help=f"Formats of the gradient: {', '.join(GRADIENTS)}; matching by default.")
    ] = None,
    dtype: Annotated[Many, typer.Option(help=f"These of {', '.join(DTYPES)}; float32 by default.")] = None,
    pages: Pages = "fresh",
    reuse_memory: Annotated[bool, typer.Option("--reuse-memory", help="The same as --pages reused.")] = False,
    peers: Annotated[
        Many, typer.Option(help="Only these of keelnorm, eager, compile, onednn, relu, copy, clone.")
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too; slow to start.")
    ] = False,
    threads: Threads = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each peer; 9, or 5 with --quick.")] = None,
    min_time: MinTime = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="Measure a few shapes only.")] = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time batch norm, alone and with add and ReLU, against torch and against a plain copy.

    Every result is first compared with a float64 definition. A wrong result gets no number, and the exit status is 1.
    """
    from keelnorm.bench.layer_run import run_bench, selected
    from keelnorm.bench.peers import DEFAULT_PEERS, PEERS
    from keelnorm.bench.result_table import print_report
    from keelnorm.bench.results import Settings

    names = choose("peers", peers, tuple(PEERS), DEFAULT_PEERS)
    settings = Settings(
        batch=batch,
        layouts=choose("layout", layout, LAYOUTS, LAYOUTS),
        variants=choose("variant", variant, VARIANTS, VARIANTS),
        modes=choose("mode", mode, MODES, MODES),
        shapes=split_commas(shape),
        peers=[name for name in PEERS if name in names or (compile_ and name == "compile")],
        rounds=rounds or (5 if quick else 9),
        min_time_ms=min_time,
        threads=threads,
        quick=quick,
        gradients=choose("gradient", gradient, GRADIENTS, GRADIENTS[:1]),
        dtypes=choose("dtype", dtype, DTYPES, DTYPES[:1]),
        pages=choose_pages("reused" if reuse_memory else pages),
    )
    if not selected(settings):
        known = ", ".join(one.name for one in shapes(batch, quick=quick))
        raise typer.BadParameter(
            f"nothing to measure: no shape in {' or '.join(settings.layouts)} layout contains "
            f"{' or '.join(settings.shapes)}; the shapes are {known}",
            param_hint="--shape",
        )
    report = run_bench(settings)
    deliver_result(report, out, print_report, as_json=as_json)
    if report.errors:
        raise typer.Exit(1)


@bench_app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The result to compare with.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The result to judge.")],
    peer: Annotated[str, typer.Option(help="The peer whose rows are compared.")] = "keelnorm",
    different: Annotated[
        bool, typer.Option("--different", help="Compare although machine or settings differ, and say how.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two results, as of two revisions: time after / time before, the slowest first."""
    from keelnorm.bench.compare import compare, differences, print_comparison

    first, second = _read_report(before), _read_report(after)
    if not different and (unlike := differences(first, second)):
        raise CommandError("\n  ".join(["the results are not comparable (--different compares them anyway):", *unlike]))
    try:
        comparison = compare(first, second, peer)
    except ValueError as error:
        raise CommandError(str(error)) from None
    deliver_result(comparison, None, print_comparison, as_json=as_json)


@bench_app.command("page")
def page_command(
    results: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="What the benchmarks wrote with --out.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.", callback=page_path)] = Path("keelnorm-bench.html"),
) -> None:
    """Draw results of layers and networks on one HTML page that needs no network."""
    need("bench", "plotly", "jinja2")
    from keelnorm.bench.result_page import bench_document
    from keelnorm.measure.page.html import write_page

    try:
        document = bench_document([_read_report(path) for path in results])
    except ValueError as error:
        raise CommandError(str(error)) from None
    write_page(document, out, template="bench.html")
    typer.echo(str(out))


def _read_report(path: Path) -> Report:
    """Read the report in a file."""
    from keelnorm.bench.results import Report

    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{path} is no result of this benchmark: {error}") from None
