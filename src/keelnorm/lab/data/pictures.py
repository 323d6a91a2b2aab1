"""Pictures in a folder for each class, decoded by Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keelnorm.lab.data.data_error import DataError, too_large
from keelnorm.lab.data.data_folder import classes_of, need_pillow

SIDE = 32
MOST_CLASSES = 20
MOST_PER_CLASS = 1000
MOST_PIXELS = 2**26
"""The largest picture that is decoded; Pillow warns of larger ones only."""


def read_pictures(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 32, 32) in bytes, resized, and their classes in the order of the folders' names.

    The first 20 classes and the first 1,000 pictures of each are read.

    Raises:
        DataError: Pillow is missing, or can't decode a file, or the file's header claims more than 2**26 pixels, which
            are then not decoded.
    """
    need_pillow()
    pictures, labels = [], []
    for label, paths in enumerate(list(classes_of(files).values())[:MOST_CLASSES]):
        pictures += [_pixels(path) for path in paths[:MOST_PER_CLASS]]
        labels += [label] * len(paths[:MOST_PER_CLASS])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def _pixels(path: Path) -> np.ndarray:
    """(32, 32, 3) bytes."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a lower limit below
            picture = Image.open(path)
        with picture:
            picture.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise too_large(path, f"{width} x {height} pixels", f"{MOST_PIXELS} pixels")
            return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    except DataError:
        raise
    except Image.DecompressionBombError:  # raised as the header is read
        raise too_large(path, "far more pixels", f"{MOST_PIXELS} pixels") from None
    except Exception as error:  # what is raised for a broken picture differs by its format
        raise DataError(f"{path} can't be decoded as a picture ({error}); replace it, or remove it") from None
