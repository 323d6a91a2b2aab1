"""Pictures in a folder for each class, decoded by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenkeel.lab.data.errors import DataError
from evenkeel.lab.data.folder import NO_PILLOW, classes_of

SIDE = 32
MOST_CLASSES = 20
MOST_PER_CLASS = 1000


def read_pictures(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 32, 32) in [0, 1], resized, and their classes in the order of the folders' names.

    The first 20 classes and the first 1,000 pictures of each are read.

    Raises:
        DataError: Pillow is missing, or can't decode a file.
    """
    if find_spec("PIL") is None:
        raise DataError(NO_PILLOW)
    pictures, labels = [], []
    for label, paths in enumerate(list(classes_of(files).values())[:MOST_CLASSES]):
        pictures += [_pixels(path) for path in paths[:MOST_PER_CLASS]]
        labels += [label] * len(paths[:MOST_PER_CLASS])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels)


def _pixels(path: Path) -> np.ndarray:
    """(32, 32, 3) bytes."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
            return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    except Exception as error:  # what is raised for a broken picture differs by its format
        raise DataError(f"{path} can't be decoded as a picture ({error}); replace it, or remove it") from None
