"""Options and checks that commands of different groups share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from keelnorm.engine.atomic_write import obstacle


def writable_path(path: Path | None) -> Path | None:
    """Check that a file can be written to a path."""
    if path is not None and (why_not := obstacle(path)):
        raise typer.BadParameter(why_not)
    return path


def page_path(path: Path) -> Path:
    """Check that a page can be written to a path."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory; name a file in it, such as {path}/page.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"the name of a page must end in .html; got {path}")
    writable_path(path)
    return path


AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
