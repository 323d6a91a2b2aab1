"""The command line. What a command needs is imported when it runs, so that `--help` answers soon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from keelnorm.engine.optional_imports import lacking

try:
    import typer

    from keelnorm.bench.group import bench_app, read_report
    from keelnorm.cli._shared.debug_option import OPTION, Commands
    from keelnorm.cli._shared.exit_status import ended_in_one_line
    from keelnorm.cli._shared.laboratory_options import fail, need, page_path
    from keelnorm.cli.convert import convert_command
    from keelnorm.cli.demo import demo_command
    from keelnorm.cli.fold import fold_command
    from keelnorm.cli.info import info_command
    from keelnorm.cli.inspect import inspect_command
    from keelnorm.cli.lab import lab_app
    from keelnorm.cli.recalibrate import recalibrate_command
except ModuleNotFoundError:
    if words := lacking("cli", "typer", "rich"):
        raise SystemExit(f"the keelnorm command needs {words}") from None
    raise

app = typer.Typer(
    name="keelnorm",
    help="Batch normalization for PyTorch: fast, right where it usually goes wrong, shown by evidence.",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry."""
    with ended_in_one_line():
        app(prog_name="keelnorm")


def _version(asked: bool) -> None:
    if asked:
        from keelnorm import __version__

        typer.echo(f"keelnorm {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option(OPTION, help="After an error print its traceback; may stand behind a command too.")
    ] = False,
) -> None:
    pass


@bench_app.command("page")
def bench_page(
    results: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="What the benchmarks wrote with --out.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.", callback=page_path)] = Path("keelnorm-bench.html"),
) -> None:
    """Draw results of kernels and networks on one HTML page that needs no network."""
    need("bench", "plotly", "jinja2")
    from keelnorm.bench.result_page import bench_document
    from keelnorm.measure.page.html import write_page

    try:
        document = bench_document([read_report(path) for path in results])
    except ValueError as error:
        raise fail(str(error)) from None
    write_page(document, out, template="bench.html")
    typer.echo(str(out))


app.command("demo")(demo_command)
app.add_typer(lab_app, name="lab")
app.command("info")(info_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("fold")(fold_command)
app.command("recalibrate")(recalibrate_command)
app.add_typer(bench_app, name="bench")
