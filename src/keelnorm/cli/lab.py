"""The command `keelnorm lab`: measure claims about batch normalization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console

from keelnorm.cli._shared.common_options import AsJson
from keelnorm.cli._shared.failures import CommandError, need
from keelnorm.cli._shared.laboratory_options import Fresh, Jobs, Page, Seeds
from keelnorm.cli._shared.laboratory_run import PACKAGES, deliver, measure, opened

if TYPE_CHECKING:
    from keelnorm.lab.core.claim import Claim
    from keelnorm.lab.core.laboratory import Order

lab_app = typer.Typer(
    help="Measure claims about batch normalization: verdicts with intervals, and a page.",
    no_args_is_help=True,
)

Names: TypeAlias = Annotated[
    list[str] | None, typer.Argument(metavar="[CLAIM]...", help="Claims by name or number; all by default.")
]
PAGE = Path("keelnorm-lab.html")


@lab_app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """List the claims: number, name, statement, and the data each can use."""
    need("lab", *PACKAGES)
    from keelnorm.lab.core.claim import claims
    from keelnorm.measure.page.terminal import show_claims

    rows = [
        {
            "number": claim.number,
            "name": claim.name,
            "title": claim.title,
            "statement": claim.statement,
            "data": list(claim.data),
        }
        for claim in claims().values()
    ]
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        show_claims(rows, Console())


@lab_app.command("run")
def run_command(
    names: Names = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look at each claim; the default.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="More seeds, finer grids, longer training: for numbers to rely on.")
    ] = False,
    seeds: Seeds = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder with your data: MNIST's IDX files, class folders of images, WAV files of spoken words. "
            "Claims that can use them do so, in addition to the bundled data."
        ),
    ] = None,
    out: Page = PAGE,
    jobs: Jobs = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Dask (tcp://host:port) or Ray (ray://host:port) cluster."),
    ] = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Measure claims on this machine, print a verdict for each, and write a page that needs no network.

    Results are stored as they come. A run that was stopped or killed continues when the same command is given again.
    """
    need("lab", *PACKAGES)
    from keelnorm.lab.core.clusters import ClusterError
    from keelnorm.lab.core.clusters import cluster as on_cluster
    from keelnorm.lab.core.laboratory import Order
    from keelnorm.lab.core.plan import Plan

    if quick and full:
        raise typer.BadParameter("choose one of --quick and --full")
    selected = _chosen(names)
    data = () if data_dir is None else _found(data_dir)
    folder = None if data_dir is None else data_dir.absolute()
    order = Order(selected, Plan(quick=not full, seeds=seeds, data=data), folder)
    try:
        around = on_cluster(cluster)
    except ClusterError as error:
        raise CommandError(str(error)) from None
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="--cluster") from None
    measure(order, out, jobs=jobs, fresh=fresh, as_json=as_json, around=around)


@lab_app.command("report")
def report_command(names: Names = None, out: Page = PAGE, as_json: AsJson = False) -> None:
    """Write the page again from the results stored beside it; nothing is measured."""
    need("lab", *PACKAGES)
    from keelnorm.lab.core.laboratory import report_order

    store = opened(out)
    deliver(report_order(_stored(names, out, store.order), store), out, store, as_json=as_json)


@lab_app.command("show")
def show_command(names: Names = None, out: Page = PAGE, as_json: AsJson = False) -> None:
    """Print claims with findings, tables, setup and sources, from the results stored beside the page."""
    need("lab", *PACKAGES)
    from keelnorm.lab.core.laboratory import report_order
    from keelnorm.measure.page.terminal import show_section

    store = opened(out)
    document = report_order(_stored(names, out, store.order), store)
    if as_json:
        typer.echo(json.dumps(document["sections"], allow_nan=False))
        return
    console = Console()
    for section in document["sections"]:
        show_section(section, console)


def _found(folder: Path) -> tuple[str, ...]:
    from keelnorm.lab.data import discover, limits

    try:
        found = discover(folder)
        for limit in limits(folder, found):
            typer.echo(limit, err=True)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--data-dir") from None
    return tuple(found)


def _chosen(names: list[str] | None) -> list[Claim]:
    from keelnorm.lab.core.claim import chosen

    try:
        return chosen(names or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="CLAIM") from None


def _stored(names: list[str] | None, page: Path, plain: dict[str, object] | None) -> Order:
    """The order of the last run beside this page, or its part for claims of these names."""
    from keelnorm.lab.core.laboratory import order_from, results_beside

    selected = _chosen(names)
    if plain is None:
        raise CommandError(
            f"{results_beside(page)} has no results of this version; `keelnorm lab run --out {page}` measures, and "
            "--out names another page"
        )
    try:
        return order_from(plain | {"claims": [claim.name for claim in selected]} if names else plain)
    except ValueError as error:
        raise CommandError(f"{results_beside(page)}: {error}; `keelnorm lab run --out {page}` measures anew") from None
