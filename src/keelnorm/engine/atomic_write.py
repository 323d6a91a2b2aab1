"""Atomic writes of files, and system errors that name the file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, and make its folder; after an error the old file is unchanged."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file gets its real name when it is complete, and after an error nothing is left."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)


def obstacle(path: Path) -> str | None:
    """Say why no file can be written at a path; None if one can."""
    if path.is_dir():
        return f"{path} is a directory; name a file in it"
    if path.exists() and not path.is_file():
        return f"{path} is no ordinary file, but a pipe or a device; name a file"
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                return f"nothing can be written to {parent}"
            break
    return None
