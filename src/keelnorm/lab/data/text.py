"""Text that every reader has: the source code of Python's standard library."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ASCII = 128


@cache
def characters() -> tuple[Tensor, Tensor, Tensor]:
    """ASCII codes of the standard library's modules: for training, validation and test, a tenth of the files each."""
    return divided(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


def divided(files: list[Path]) -> tuple[Tensor, Tensor, Tensor]:
    """The files' characters as codes below 128, for training, validation and test.

    Every tenth file is for validation, and every tenth for test.

    Raises:
        ValueError: there are fewer than ten files.
    """
    if len(files) < 10:
        raise ValueError(f"text is divided by files, of which at least ten are needed; there are {len(files)}")
    texts = [file.read_text(encoding="utf-8", errors="replace").encode("ascii", "replace") for file in files]
    parts = [
        b"".join(text for index, text in enumerate(texts) if which(index % 10))
        for which in (lambda index: index > 1, (0).__eq__, (1).__eq__)
    ]
    train, validation, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, validation, test
