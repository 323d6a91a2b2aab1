"""Errors about data that can't be used."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A file or folder of the reader's that is missing or broken: which one, what is wrong with it, what to do."""


def too_large(path: Path, what: str, most: str) -> DataError:
    """The error for a file whose header claims more than is read; what it claims has not been unpacked."""
    return DataError(
        f"{path} has {what} by its header, and at most {most} are read; put a smaller one in its place, or move it out"
    )
