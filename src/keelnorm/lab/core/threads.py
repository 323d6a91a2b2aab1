"""One thread for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch works on one thread inside, and on as many as before afterwards.

    Where as many processes as cores are at work, and on networks this small, a second thread waits more
    than it helps; and a time that is measured must not hang on whether the other cores are free.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
