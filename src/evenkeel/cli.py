"""The command line. What a command needs is imported when it runs, so that `--help` answers soon."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console

    from evenkeel.bench.group import bench_app, read_report
    from evenkeel.commands.convert import convert_command
    from evenkeel.commands.fold import fold_command
    from evenkeel.commands.inspect import inspect_command
    from evenkeel.commands.recalibrate import recalibrate_command
    from evenkeel.info import info_command
except ModuleNotFoundError as error:
    raise SystemExit(f"the evenkeel command needs the package {error.name}: pip install 'evenkeel[cli]'") from None

app = typer.Typer(
    name="evenkeel",
    help="Batch normalization for PyTorch: fast, right where it usually goes wrong, shown by evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry."""
    app()


def fail(message: str, code: int = 1) -> typer.Exit:
    """Say what is wrong on the standard error stream; the caller raises what is returned."""
    typer.echo(message, err=True)
    return typer.Exit(code)


def need(extra: str, *modules: str) -> None:
    """End, saying what to install, when a package that a command needs is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise fail(
            f"this command needs {', '.join(missing)}, which the extra [{extra}] brings: "
            f"pip install 'evenkeel[{extra}]'"
        )


def _version(asked: bool) -> None:
    if asked:
        from evenkeel import __version__

        typer.echo(f"evenkeel {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def _page_path(path: Path) -> Path:
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory; name a file in it, such as {path}/demo.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"{path} is to be a page; its name has to end in .html")
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise typer.BadParameter(f"nothing can be written to {parent}")
            break
    return path


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="The page to write. Results are kept beside it, in a file that ends in .jsonl, and "
            "a run that was stopped goes on from there.",
            callback=_page_path,
        ),
    ] = Path("evenkeel-demo.html"),
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=1000,
            help="How many seeds; intervals run over them. 5 by default, 3 with --quick.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Coarser grids, shorter training, fewer seeds: a first look."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run this experiment alone, by name; may be given again."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes beside each other; one a core by default.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again, whatever is stored.")] = False,
    reuse_memory: Annotated[
        bool, typer.Option("--reuse-memory", help="Keep the memory of freed tensors, in this process alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Show on real data what batch normalization does, without it, with torch.nn's, with evenkeel's.

    Trains a fully connected and a small convolutional network on scikit-learn's handwritten digits,
    prints a table and writes one HTML page with interactive plots that needs no network.
    """
    need("lab", "joblib", "sklearn", "scipy", "plotly", "jinja2")
    from evenkeel.lab.demo import chosen, results_beside, run_demo
    from evenkeel.lab.experiment import Plan
    from evenkeel.lab.progress import ProgressBar
    from evenkeel.lab.store import Store
    from evenkeel.memory import reuse_memory as reused_memory
    from evenkeel.report.page import write_page
    from evenkeel.report.terminal import show

    try:
        selected = chosen(only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from None
    plan = Plan.quickly(seeds) if quick else Plan.fully(seeds)
    quiet = Console(stderr=True)
    store = Store(results_beside(out), reuse=not fresh)
    for warning in store.warnings:
        quiet.print(f"warning: {warning}", markup=False)
    try:
        with reused_memory() if reuse_memory else nullcontext(), ProgressBar(quiet) as bar:
            document = run_demo(plan, selected, store, jobs=jobs, listener=bar)
    except KeyboardInterrupt:
        message = f"stopped; what was measured is kept in {store.path}, and the same command goes on"
        raise fail(message, 130) from None
    document["files"] = {"page": str(out), "results": str(store.path)}
    write_page(document, out)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        show(document, Console())
    if document["run"]["failed"]:
        raise fail(f"{document['run']['failed']} of {document['run']['cells']} cells failed")


@bench_app.command("page")
def bench_page(
    results: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="What the benchmarks wrote with --out.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.", callback=_page_path)] = Path("evenkeel-bench.html"),
) -> None:
    """Draw results of kernels and networks on one HTML page that needs no network."""
    need("bench", "plotly", "jinja2")
    from evenkeel.bench.page import bench_document
    from evenkeel.report.page import write_page

    try:
        document = bench_document([read_report(path) for path in results])
    except ValueError as error:
        raise fail(str(error)) from None
    write_page(document, out, template="bench.html")
    typer.echo(str(out))


app.command("info")(info_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("fold")(fold_command)
app.command("recalibrate")(recalibrate_command)
app.add_typer(bench_app, name="bench")


if __name__ == "__main__":
    main()
