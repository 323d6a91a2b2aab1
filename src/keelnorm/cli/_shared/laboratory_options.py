"""Options that `keelnorm demo` and `keelnorm lab` share, and how a command ends when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from keelnorm.engine.atomic_write import obstacle
from keelnorm.engine.optional_imports import lacking

MOST_SEEDS = 1000


def fail(message: str, code: int = 1) -> typer.Exit:
    """Say what is wrong on the standard error stream; the caller raises what is returned."""
    typer.echo(message, err=True)
    return typer.Exit(code)


def need(extra: str, *modules: str) -> None:
    """End, saying what to install, when a package that a command needs is missing."""
    if words := lacking(extra, *modules):
        raise fail(f"this command needs {words}")


def page_path(path: Path) -> Path:
    """A path where a page can be written."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory; name a file in it, such as {path}/page.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"{path} is to be a page; its name has to end in .html")
    if why_not := obstacle(path):
        raise typer.BadParameter(why_not)
    return path


def measured_page_path(path: Path) -> Path:
    """A path where a page can be written, and results beside it."""
    if why_not := obstacle(page_path(path).with_suffix(".jsonl")):
        raise typer.BadParameter(f"results are kept beside the page, and {why_not}")
    return path


Page: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--out",
        help="The page. Results are kept beside it, in a file that ends in .jsonl, and a run that was stopped goes on "
        "from there.",
        callback=measured_page_path,
    ),
]
Seeds: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=2, max=MOST_SEEDS, help="How many seeds, in place of each claim's own number; intervals run over them."
    ),
]
Jobs: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Processes beside each other; one a core by default.")]
Fresh: TypeAlias = Annotated[bool, typer.Option("--fresh", help="Measure everything again, whatever is stored.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
