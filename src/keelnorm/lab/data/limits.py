"""Which part of a large data set is used, so that runs stay short; said before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keelnorm.lab.core.plan import kind_of
from keelnorm.lab.data.data_folder import classes_of, files_of, reading_from
from keelnorm.lab.data.pictures import MOST_CLASSES, MOST_PER_CLASS
from keelnorm.lab.data.wav import MOST_EACH, MOST_SPEAKERS, MOST_WORDS, recordings_used


def limits(folder: Path, identities: Sequence[str]) -> list[str]:
    """A sentence for each data set of which only a part is read."""
    found = []
    with reading_from(folder):
        for identity in identities:
            files = files_of(identity)
            if kind_of(identity) == "images":
                classes = classes_of(files)
                used = sum(len(paths[:MOST_PER_CLASS]) for paths in list(classes.values())[:MOST_CLASSES])
                what = f"{len(files)} pictures in {len(classes)} classes"
                rule = f"the first {MOST_CLASSES} classes by name, the first {MOST_PER_CLASS} of each"
            elif kind_of(identity) == "speech":
                used, what = len(recordings_used(files)), f"{len(files)} recordings"
                rule = (
                    f"the first {MOST_WORDS} words by name, the {MOST_SPEAKERS} speakers with most recordings, the "
                    f"first {MOST_EACH} of each word by each"
                )
            else:
                continue
            if used < len(files):
                found.append(f"{identity}: {used} of {what} are used: {rule}")
    return found
