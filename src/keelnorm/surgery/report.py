"""The report of an operation on a model: a row for each layer, and a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Report:
    """What an operation on a model did; prints as a table.

    Args:
        operation: The operation's name, such as "convert".
        summary: Facts about the whole model, as names and plain values.
        rows: One for each layer that was looked at, in the model's order; ``row["path"]`` is its path. All rows have
            the same names. None is an empty cell.
        notes: Sentences below the table.

    Example:
        >>> report = Report("fold", {"folded": 1}, [{"path": "bn", "into": "conv", "difference": 3e-08}])
        >>> print(report)
        fold: folded 1
        path  into  difference
        bn    conv       3e-08
        >>> report.to_dict()["rows"][0]["into"]
        'conv'
    """

    operation: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are not empty in every row."""
        names = list(self.rows[0]) if self.rows else []
        return [name for name in names if any(row[name] not in (None, "") for row in self.rows)]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists and plain values, for JSON."""
        return {
            "operation": self.operation,
            "summary": dict(self.summary),
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        columns = self.columns
        lines = [columns, *([_cell(row[name]) for name in columns] for row in self.rows)] if columns else []
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        right = [self._is_number(name) for name in columns]
        rows = [
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self._heading(), *rows, *self.notes])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        if self.columns:
            table = Table(title=Text(self._heading()), title_style="bold", title_justify="left")
            for name in self.columns:
                table.add_column(name, justify="right" if self._is_number(name) else "left", overflow="fold")
            for row in self.rows:
                table.add_row(*(Text(_cell(row[name])) for name in self.columns))
            parts.append(table)
        else:
            parts.append(Text(self._heading(), style="bold"))
        return Group(*parts, *map(Text, self.notes))

    def _heading(self) -> str:
        return f"{self.operation}: " + ", ".join(f"{name} {_cell(value)}" for name, value in self.summary.items())

    def _is_number(self, name: str) -> bool:
        return all(isinstance(row[name], int | float | None) for row in self.rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
