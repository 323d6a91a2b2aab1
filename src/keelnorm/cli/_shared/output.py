"""The results of a command on a model: the report, on the terminal and in a file, and the model's file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from keelnorm.cli._shared.failures import CommandError
from keelnorm.engine.atomic_write import replacing, write_text

if TYPE_CHECKING:
    from torch import nn

    from keelnorm.surgery import Report


class Told(Protocol):
    """A result that is printed as a table or as JSON: a report, a diagnosis."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""


@dataclass(frozen=True)
class Output:
    """Where results go; checked when it is created, before anything else is done.

    Args:
        as_json: Print the report as JSON.
        report: The report's file.
        out: The model's file.
        force: Whether files that exist are overwritten.
        suffixes: What the model's file may end in.
    """

    as_json: bool
    report: Path | None
    out: Path | None = None
    force: bool = False
    suffixes: tuple[str, ...] = (".safetensors",)

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix not in self.suffixes:
            raise CommandError(f"--out must end in {' or '.join(self.suffixes)}; got {self.out}")
        if self.report is not None and self.report.suffix != ".json":
            raise CommandError(f"--report must end in .json; got {self.report}")
        for path in (self.out, self.report):
            if path is None:
                continue
            if path.is_dir():
                raise CommandError(f"{path} is a directory; name a file in it")
            if path.exists() and not self.force:
                raise CommandError(f"{path} exists; --force overwrites it")
            if not os.access(path.parent, os.W_OK):
                raise CommandError(f"nothing can be written to {path.parent}; it must be a directory that is there")

    def save(self, model: nn.Module, report: Report) -> None:
        """Write the model's state_dict, if asked for, and add a note."""
        report.notes.extend(self.save_state(model))

    def save_state(self, model: nn.Module) -> list[str]:
        """Write the model's state_dict, if asked for; a note says so."""
        if self.out is None:
            return []
        from keelnorm.cli._shared.weights_file import save_state_dict

        with replacing(self.out) as temporary:
            save_state_dict(model, temporary)
        return [f"The state_dict was written to {self.out}."]

    def tell(self, report: Told, shown: Told | None = None) -> None:
        """Write and print the report; ``shown`` is printed as the table in its place, if given."""
        text = json.dumps(_plain(report.to_dict()), allow_nan=False)
        if self.report is not None:
            write_text(self.report, text + "\n")
        if self.as_json:
            typer.echo(text)
            return
        from rich.console import Console

        console = Console()
        if console.is_terminal:
            console.print(shown or report)
        else:
            typer.echo(str(shown or report))


def _plain(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
