"""MNIST's files: a header of big-endian numbers, then one byte a pixel or label; gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from keelnorm.lab.data.data_error import DataError, too_large

_UNSIGNED_BYTE = 0x08
MOST_VALUES = 2**30
"""The most values in a file; the largest data set of this form, EMNIST by class, has about half as many."""


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file, in the shape that its header says.

    Raises:
        DataError: the file is no such file of this many dimensions, not whole, or its header claims more than 2**30
            values. The header is read first, and of what is packed no more is unpacked than it says.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.open(file) if packed else file as stream:
                return _values(path, stream, dimensions, None if packed else path.stat().st_size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); fetch it again") from None


def _values(path: Path, stream: BinaryIO | gzip.GzipFile, dimensions: int, size: int | None) -> Tensor:
    """What is in an open file of this size; None: not known before it is unpacked."""
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    header = stream.read(4 + 4 * dimensions)
    if header[:4] != magic:
        raise DataError(
            f"{path} begins with {header[:4].hex() or 'nothing'}, and an IDX file of bytes in {dimensions} dimensions "
            f"begins with {magic.hex()}; fetch it again"
        )
    shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
    count, claimed = math.prod(shape), " x ".join(map(str, shape))
    if count > MOST_VALUES:
        raise too_large(path, f"{claimed} values", f"{MOST_VALUES} values")
    expected = 4 + 4 * dimensions + count
    raw = stream.read(count + 1) if size is None or size == expected else b""
    found = len(header) + len(raw) if size is None else size
    if found != expected:
        more = " or more" if size is None and found > expected else ""
        raise DataError(
            f"{path} has {found} bytes{more}, and by its header {expected} ({claimed} values); fetch it again"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(shape) if count else torch.empty(shape).byte()


def read_mnist(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """All images (n, 1, H, W) in bytes and labels of files of images and labels in turns, pooled.

    Raises:
        DataError: one can't be read, or two do not fit.
    """
    pictures: list[Tensor] = []
    labels: list[Tensor] = []
    for path, beside in zip(files[::2], files[1::2], strict=True):
        x, y = read_idx(path, 3), read_idx(beside, 1)
        if len(x) != len(y):
            raise DataError(f"{path} has {len(x)} images, and {beside.name} {len(y)} labels; fetch both again")
        if pictures and x.shape[1:] != pictures[0].shape[1:]:
            raise DataError(
                f"{path} has images of {_by(x)} pixels, and {files[0].name} of {_by(pictures[0])}; leave one of the two"
            )
        pictures.append(x)
        labels.append(y)
    return torch.cat(pictures).unsqueeze(1), torch.cat(labels).long()


def _by(x: Tensor) -> str:
    return " x ".join(map(str, x.shape[1:]))
