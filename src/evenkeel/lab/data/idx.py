"""MNIST's files: a header of big-endian numbers, then one byte a pixel or label; gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenkeel.lab.data.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The numbers of an IDX file of unsigned bytes, in the shape that its header says.

    Raises:
        DataError: the file is no such file of this many dimensions, or not whole.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); fetch it again") from None
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if raw[:4] != magic:
        raise DataError(
            f"{path} begins with {raw[:4].hex() or 'nothing'}, and an IDX file of bytes in {dimensions} dimensions "
            f"begins with {magic.hex()}; fetch it again"
        )
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(raw) < header or len(raw) != expected:
        raise DataError(
            f"{path} has {len(raw)} bytes, and by its header {expected} ({' x '.join(map(str, shape))} values); "
            "fetch it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy()).view(shape)


def read_mnist(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """All images (n, 1, H, W) in [0, 1] and labels of files of images and labels in turns, pooled.

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
    return torch.cat(pictures).unsqueeze(1).float() / 255, torch.cat(labels).long()


def _by(x: Tensor) -> str:
    return " x ".join(map(str, x.shape[1:]))
