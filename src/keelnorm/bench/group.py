"""The commands under `keelnorm bench`; without one of them it runs the kernels' benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from keelnorm.bench.command import bench_command
from keelnorm.bench.folding_command import folding_command
from keelnorm.bench.model_command import models_command
from keelnorm.bench.network_command import networks_command
from keelnorm.bench.variant_command import variants_command

if TYPE_CHECKING:
    from keelnorm.bench.results import Report


class RunByDefault(TyperGroup):
    """A group whose options, given without a command, are those of `run`."""

    # The types are those of whichever click typer brings along.
    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Put `run` where no command is named."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(cls=RunByDefault, help="Time batch norm and whole networks, compare results, draw them.")
bench_app.command("run")(bench_command)
bench_app.command("networks")(networks_command)
bench_app.command("folding")(folding_command)
bench_app.command("models")(models_command)
bench_app.command("variants")(variants_command)


@bench_app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The result to compare with.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The result to judge.")],
    peer: Annotated[str, typer.Option(help="Whose rows to compare.")] = "keelnorm",
    different: Annotated[
        bool, typer.Option("--different", help="Compare although machine or settings differ; it is said how.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Compare two results, as of two revisions: time after / time before, the losers first."""
    from keelnorm.bench.compare import compare, differences, print_comparison

    first, second = (read_report(path) for path in (before, after))
    unlike = differences(first, second)
    if unlike and not different:
        typer.echo("these are not comparable; --different compares them all the same:", err=True)
        for line in unlike:
            typer.echo(f"  {line}", err=True)
        raise typer.Exit(1)
    try:
        comparison = compare(first, second, peer)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(comparison.to_json())
    else:
        print_comparison(comparison)


def read_report(path: Path) -> "Report":
    """The report in a file; a usage error if it is none."""
    from keelnorm.bench.results import Report

    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{path} is no result of this benchmark: {error}") from None
