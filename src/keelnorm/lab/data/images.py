"""Images with labels: scikit-learn's digits, and what the reader has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from keelnorm.lab.core.plan import kind_of
from keelnorm.lab.data.data_folder import files_of
from keelnorm.lab.data.data_split import Split, split
from keelnorm.lab.data.idx import read_mnist
from keelnorm.lab.data.pictures import read_pictures

GREY_LEVELS = 16.0
HELD_OUT = {"digits": (200, 300), "mnist": (1000, 1000), "images": (1000, 1000)}
"""Samples for validation and for test, by kind; at most a quarter of the data each."""
MOST_TRAINING = 6000
"""Samples in the training part where the data set is the reader's, so that a claim's steps are some epochs of it."""


def digits(seed: int, *, centered: bool = True) -> Split:
    """scikit-learn's 1,797 handwritten digits (8 x 8) as 1,297 / 200 / 300; see `images`."""
    return images("digits", seed, centered=centered)


def images(data: str, seed: int, *, centered: bool = True, train: int | None = None) -> Split:
    """Images (n, C, H, W) and their classes, divided by `seed`.

    Args:
        data: a data set's identity: "digits", or one that `keelnorm.lab.data.discover` found: "mnist@…" (grey, as large
            as they are) or "images@…" (in colour, 32 x 32).
        seed: draws the division.
        centered: as `Split.centered` makes them; without, values from 0 to 1 as they come.
        train: samples in the training part; None: all that are left, of the reader's own data at most 6,000.

    Raises:
        DataError: the files are missing or broken.
    """
    x, y = all_images(data)
    validation, test = (min(count, len(x) // 4) for count in HELD_OUT[kind_of(data)])
    if train is None and kind_of(data) != "digits":
        train = min(MOST_TRAINING, len(x) - validation - test)
    divided = split(x, y, data=data, seed=seed, validation=validation, test=test, train=train)
    return divided.centered() if centered else divided


@cache
def all_images(data: str) -> tuple[Tensor, Tensor]:
    """All images and classes of a data set; read once a process. What comes as bytes stays bytes, see `split`.

    Raises:
        DataError: as `images`.
        ValueError: there is no such data set.
    """
    kind = kind_of(data)
    if kind == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pictures = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / GREY_LEVELS
        return pictures, torch.tensor(bunch.target, dtype=torch.int64)
    if kind == "mnist":
        return read_mnist(files_of(data))
    if kind == "images":
        return read_pictures(files_of(data))
    raise ValueError(f"no images are called {data!r}; there are {', '.join(HELD_OUT)}")
