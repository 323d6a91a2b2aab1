"""The reader's own folder: which data sets it has, and where their files are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from keelnorm.engine.error_messages import shortened
from keelnorm.engine.optional_imports import lacking
from keelnorm.lab.data.data_error import DataError
from keelnorm.lab.data.wav import recordings_used, word_and_speaker

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
LEVELS = ("train", "test", "val", "valid", "validation")
"""Folders between a data set's own and those of its classes."""
READ_BYTES = 32 * 2**20
"""Up to this size in all, the contents of a data set's files are part of its identity."""

_folder: Path | None = None


def need_pillow() -> None:
    """Raise a DataError that says what to install where Pillow is missing."""
    if words := lacking("lab", "PIL"):
        raise DataError(f"pictures need {words}")


@contextmanager
def reading_from(folder: Path | None) -> Iterator[None]:
    """Read data sets that are not bundled from this folder inside the block."""
    global _folder
    before, _folder = _folder, folder
    try:
        yield
    finally:
        _folder = before


def discover(folder: Path) -> list[str]:
    """The identities of the data sets that a folder has, in itself or in the folders directly in it.

    An identity is a kind and eight digits of a hash over the names and sizes of the files, and over their contents
    where they come to no more than 32 MiB: "mnist@1f0c9a3e", "images@…"; "speech@….6" says also that there are six
    speakers. docs/lab_data.md shows the forms.

    Raises:
        DataError: it has none, two of a kind, or one that lacks a part; says what was looked for and what was there.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data-dir takes a folder with {_known_forms()}")
    found = _files(folder)
    if "images" in found:
        need_pillow()
    if not found:
        there = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        raise DataError(
            f"no data were found in {folder} or in the folders in it, which has {shortened(there) or 'nothing'}; "
            f"looked for: {_known_forms()}"
        )
    return [f"{kind}@{_digest(folder, kind, files)}" for kind, files in found.items()]


def files_of(identity: str) -> list[Path]:
    """The files of a data set of the reader's.

    Raises:
        DataError: no folder was named, or its files are not those that the identity was made of.
    """
    kind = identity.partition("@")[0]
    if _folder is None:
        raise DataError(f"{identity} is read from a folder, and none was named: give --data-dir")
    files = _files(_folder).get(kind, []) if _folder.is_dir() else []
    now = f"{kind}@{_digest(_folder, kind, files)}" if files else f"no {kind} there"
    if now != identity:
        raise DataError(
            f"{_folder} does not hold the files that {identity} stands for ({now}): they were changed, or it is "
            "another folder; put them back, or run again with --data-dir, which then measures anew"
        )
    return files


def classes_of(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files by the name of their folder, in the order of the names."""
    by_class: dict[str, list[Path]] = {}
    for path in files:
        by_class.setdefault(path.parent.name, []).append(path)
    return dict(sorted(by_class.items()))


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each kind of data set, in the folder itself or else in those in it."""
    found: dict[str, tuple[Path, list[Path]]] = {}
    for place in (folder, *_folders(folder)):
        for kind, (what, find) in KINDS.items():
            before = found.get(kind, (None, []))[0]
            if before == folder:
                continue
            files = find(place)
            if files and before is not None:
                raise DataError(
                    f"{before} and {place} both hold {what}; name one of them, as in --data-dir {before}, or move one "
                    "out"
                )
            if files:
                found[kind] = place, files
    return {kind: files for kind, (_, files) in found.items()}


def _folders(place: Path) -> list[Path]:
    """The folders in it, except those whose names begin with "." or, as `_background_noise_`, with "_"."""
    return sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] not in "._")


def _files_in(place: Path) -> list[Path]:
    """The regular files in it: reading from a pipe would wait."""
    return [path for path in place.iterdir() if path.is_file()]


def _find_idx(place: Path) -> list[Path]:
    """Images and labels in turns; the unpacked one of a file that is there packed and unpacked."""
    named: dict[str, Path] = {}
    for path in sorted(_files_in(place), key=lambda path: (path.suffix != ".gz", path.name)):
        if path.name.removesuffix(".gz").endswith("ubyte"):
            named[path.name.removesuffix(".gz")] = path
    files, sets = [], set()
    for name in sorted(named):
        twin = name.replace("images", "labels").replace("idx3", "idx1")
        if twin == name:
            twin = name.replace("labels", "images").replace("idx1", "idx3")
        if twin == name:
            raise DataError(f"{named[name]} is named like an IDX file, but neither images nor labels; move it out")
        if twin not in named:
            what = "labels" if "images" in name else "images"
            raise DataError(f"{named[name]} has no {what} beside it: put {twin} or {twin}.gz there")
        if "images" in name:
            files += [named[name], named[twin]]
            sets.add(name.partition("images")[0].replace("train", "").replace("t10k", "").replace("test", ""))
    if len(sets) > 1:
        raise DataError(
            f"{place} holds IDX files of {len(sets)} data sets ({', '.join(sorted(sets))}); leave one there"
        )
    return files


def _find_wavs(place: Path) -> list[Path]:
    own = sorted(path for path in _files_in(place) if path.suffix.lower() == ".wav")
    files = own or _in_classes(place, (".wav",))
    for path in files:
        word_and_speaker(path)
    return files


def _find_pictures(place: Path) -> list[Path]:
    """Those in folders of classes, or else in folders of classes a level further down, all levels together."""
    levels = [level for level in _folders(place) if level.name.lower() in LEVELS]
    return _in_classes(place, PICTURES) or [file for level in levels for file in _in_classes(level, PICTURES)]


def _in_classes(place: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files in the folders directly in this one, where at least two of these have any.

    Raises:
        DataError: another of these folders has none, and no data of another kind either.
    """
    classes = [path for path in _folders(place) if path.name.lower() not in LEVELS]
    by_class = {each: sorted(path for path in _files_in(each) if path.suffix.lower() in suffixes) for each in classes}
    if sum(map(bool, by_class.values())) < 2:
        return []
    for each, files in by_class.items():
        if not files and not any(find(each) for _, find in KINDS.values()):
            raise DataError(
                f"{each} stands among folders of classes, and has no {'/'.join(suffixes)}; put some in it, or remove it"
            )
    return [file for files in by_class.values() for file in files]


KINDS: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {
    "mnist": ("MNIST's IDX files (…images-idx3-ubyte beside …labels-idx1-ubyte, gzipped or not)", _find_idx),
    "images": ("two or more folders of classes with pictures in them (png, jpg, …)", _find_pictures),
    "speech": (
        "WAV files of spoken words, named {word}_{speaker}_{number}.wav, or {speaker}_nohash_{number}.wav in a folder "
        "for each word",
        _find_wavs,
    ),
}


def _known_forms() -> str:
    return "; ".join(what for what, _ in KINDS.values())


def _digest(folder: Path, kind: str, files: Sequence[Path]) -> str:
    stats = [path.stat() for path in files]
    facts = zip(files, stats, strict=True)
    digest = _digest_of(tuple((folder, path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))
    # How many speakers there are decides what work there is, which must be known where the files are not.
    return (
        f"{digest}.{len({speaker for _, speaker in recordings_used(files).values()})}" if kind == "speech" else digest
    )


@cache
def _digest_of(facts: tuple[tuple[Path, Path, int, int], ...]) -> str:
    """Eight digits of the files' names, sizes and, of small ones, contents. When they were written doesn't count."""
    found = hashlib.sha256()
    with_contents = sum(size for _, _, size, _ in facts) <= READ_BYTES
    for folder, path, size, _ in facts:
        found.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        if with_contents:
            found.update(path.read_bytes())
    return found.hexdigest()[:8]
