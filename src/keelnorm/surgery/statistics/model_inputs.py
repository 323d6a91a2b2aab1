"""Run a model over a data set: pass each batch to it, and show a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any

from torch import Tensor, nn

from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe, is_count
from keelnorm.surgery.observation.nested_tensors import map_tensors

#: Runs the model on a batch; only entropy minimization uses what it returns.
Forward = Callable[[nn.Module, Any], Any]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call ``model(batch)`` with a tensor, ``model(batch[0])`` with a tuple or list, ``model(**batch)`` with a mapping.

    Tensors are moved to the device of the model's parameters.

    Raises:
        TypeError: The batch is something else.
    """
    device = next((p.device for p in model.parameters()), None)

    def moved(value: Any) -> Any:
        return value if device is None else map_tensors(lambda t: t.to(device), value)

    if isinstance(batch, Tensor):
        return model(moved(batch))
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return model(moved(batch[0]))
    if isinstance(batch, Mapping):
        return model(**moved(dict(batch)))
    raise TypeError(
        "a batch must be a tensor, a tuple or list that begins with one, or a mapping of the model's keywords; got "
        f"{describe(batch)}. For other batches, pass forward=lambda model, batch: model(...)"
    )


def check_loader(what: str, loader: Any, passes: int) -> None:
    """Raise unless the loader gives batches, for as many passes as needed."""
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise RefusedTypeError(
            f"{what}: loader must be an iterable of batches; got {describe(loader)}. For a single batch, pass [batch]"
        )
    if passes > 1 and iter(loader) is loader:
        raise RefusedValueError(
            f"{what}: sequential=True and entropy=True need several passes over the data, so the loader must be able "
            f"to start again; got {type(loader).__name__}, which can be used once. Pass a list or a DataLoader"
        )


@contextmanager
def passes_over(
    loader: Iterable[Any], most: int | None, progress: bool | None, what: str, passes: int = 1
) -> Iterator[Callable[[], Iterator[Any]]]:
    """Give the block a function that starts a pass over the batches, with a progress bar if wanted."""
    if most is not None and not is_count(most):
        raise RefusedValueError(f"{what}: max_batches must be None or an integer of at least 1; got {describe(most)}")
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown or find_spec("rich") is None:
        yield lambda: islice(iter(loader), most)
        return
    from rich.console import Console
    from rich.progress import Progress

    try:
        length: int | None = len(loader)  # type: ignore[arg-type]
    except TypeError:
        length = None
    if most is not None:
        length = most if length is None else min(length, most)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None if length is None else length * passes)

        def begin() -> Iterator[Any]:
            for batch in islice(iter(loader), most):
                yield batch
                bar.advance(task)

        yield begin
