"""Options that `keelnorm demo` and `keelnorm lab` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from keelnorm.cli._shared.common_options import page_path
from keelnorm.engine.atomic_write import obstacle
from keelnorm.lab.core.plan import MOST_SEEDS


def measured_page_path(path: Path) -> Path:
    """Check that a page can be written to a path, and results beside it."""
    if why_not := obstacle(page_path(path).with_suffix(".jsonl")):
        raise typer.BadParameter(f"results are stored beside the page, and {why_not}")
    return path


Page: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--out",
        help="The page. Results are stored beside it, in a .jsonl file; a run that was stopped continues from there.",
        callback=measured_page_path,
    ),
]
Seeds: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=2, max=MOST_SEEDS, help="Number of seeds, in place of each claim's own; intervals are over seeds."
    ),
]
Jobs: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Parallel processes; by default one per core.")]
Fresh: TypeAlias = Annotated[bool, typer.Option("--fresh", help="Measure everything again and ignore stored results.")]
