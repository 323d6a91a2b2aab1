"""`keelnorm layers`: the names of all layers."""

from __future__ import annotations

import typer


def layers_command() -> None:
    """List the layers."""
    import keelnorm.nn

    typer.echo("\n".join(keelnorm.nn.__all__))
