"""Tables of measurements whose columns differ in scale, as they come."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from keelnorm.lab.data.data_split import Split, split

TABLES = ("wine", "cancer")


@cache
def _table(data: str) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer, load_wine

    bunch = {"wine": load_wine, "cancer": load_breast_cancer}[data]()
    return torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target, dtype=torch.int64)


def table(data: str, seed: int) -> Split:
    """scikit-learn's wine (178 samples of 13 columns, 3 classes) or breast cancer (569 of 30, 2 classes), not scaled.

    A fifth is for validation and three tenths for test.

    Raises:
        ValueError: there is no such table.
    """
    if data not in TABLES:
        raise ValueError(f"no table is called {data!r}; there are {', '.join(TABLES)}")
    x, y = _table(data)
    return split(x, y, data=data, seed=seed, validation=len(x) // 5, test=3 * len(x) // 10)
