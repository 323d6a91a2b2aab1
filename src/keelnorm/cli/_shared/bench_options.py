"""Options of the benchmarks, and how a benchmark's result is printed and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeAlias, TypeVar

import typer

from keelnorm.cli._shared.common_options import writable_path
from keelnorm.engine.atomic_write import write_text

Many: TypeAlias = list[str] | None
Out: TypeAlias = Annotated[Path | None, typer.Option("--out", callback=writable_path, help="Write JSON to this file.")]
Threads: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Number of threads; torch's choice by default.")]
Shape: TypeAlias = Annotated[Many, typer.Option(help="Only shapes whose NxCxHxW or suite (resnet50, small) has this.")]
MinTime: TypeAlias = Annotated[float, typer.Option(min=0.0, help="Least time of a sample, ms.")]
Pages: TypeAlias = Annotated[
    str, typer.Option(help="Memory of large tensors: fresh (the allocator's default), reused, or both.")
]
Result = TypeVar("Result", bound="HasJson")


class HasJson(Protocol):
    """A result of a benchmark."""

    def to_json(self) -> str:
        """The result as JSON text."""


def choose(option: str, given: Many, legal: Sequence[str], default: Sequence[str]) -> list[str]:
    """Values of an option that may be repeated or joined by commas, in the order of `legal`."""
    values = split_commas(given)
    unknown = sorted(set(values) - set(legal))
    if unknown:
        raise typer.BadParameter(
            f"unknown {', '.join(unknown)}; legal are {', '.join(legal)}", param_hint=f"--{option}"
        )
    return [one for one in legal if one in (values or default)]


def split_commas(given: Many) -> list[str]:
    """The parts of an option that may be repeated or joined by commas."""
    return [part.strip() for text in given or () for part in text.split(",") if part.strip()]


def choose_pages(given: str) -> list[str]:
    """The page settings that are asked for and possible here; says which are not, and why."""
    from keelnorm.bench.cases import PAGES
    from keelnorm.bench.session import page_settings
    from keelnorm.memory import obstacle

    asked = choose("pages", [",".join(PAGES) if given == "both" else given], PAGES, PAGES[:1])
    try:
        found = page_settings(asked)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--pages") from None
    if found != asked:
        typer.echo(f"measured with fresh pages only, memory cannot be reused here: {obstacle()}", err=True)
    return found


def deliver_result(result: Result, out: Path | None, show: Callable[[Result], None], *, as_json: bool) -> None:
    """Print a result, as JSON or by `show`, and write it to a file; if one of the two fails, still do the other."""
    try:
        if as_json:
            typer.echo(result.to_json())
        else:
            show(result)
    finally:
        if out is not None:
            write_text(out, result.to_json() + "\n")
