"""The command line. A command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated

from keelnorm.engine.optional_imports import lacking

try:
    import typer

    from keelnorm.cli._shared.command_group import OPTION, Commands
    from keelnorm.cli._shared.exit_status import ended_in_one_line
    from keelnorm.cli.bench import bench_app
    from keelnorm.cli.convert import convert_command
    from keelnorm.cli.demo import demo_command
    from keelnorm.cli.doctor import doctor_command
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
    """Run the command line: the console entry point."""
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
        bool, typer.Option(OPTION, help="Print the traceback of an error; accepted after a command too.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo_command)
app.add_typer(lab_app, name="lab")
app.command("info")(info_command)
app.command("inspect")(inspect_command)
app.command("doctor")(doctor_command)
app.command("convert")(convert_command)
app.command("fold")(fold_command)
app.command("recalibrate")(recalibrate_command)
app.add_typer(bench_app, name="bench")
