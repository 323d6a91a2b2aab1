"""How a model is run over a data set: what a batch is to it, and a bar that shows how far it has come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any

from torch import Tensor, nn

from keelnorm.engine.error_messages import describe, is_count
from keelnorm.surgery.observation.nested_tensors import map_tensors

#: Runs the model on a batch; what it returns is looked at by entropy minimization alone.
Forward = Callable[[nn.Module, Any], Any]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model(batch)`` for a tensor, ``model(batch[0])`` for a tuple or list, ``model(**batch)`` for a mapping.

    Tensors go to the device of the model's parameters.

    Raises:
        TypeError: the batch is something else.
    """
    at = next((p.device for p in model.parameters()), None)

    def there(value: Any) -> Any:
        return value if at is None else map_tensors(lambda t: t.to(at), value)

    if isinstance(batch, Tensor):
        return model(there(batch))
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return model(there(batch[0]))
    if isinstance(batch, Mapping):
        return model(**there(dict(batch)))
    raise TypeError(
        "a batch must be a tensor, a tuple or list that begins with one, or a mapping of the model's keywords; got "
        f"{describe(batch)}. For any other, give forward=lambda model, batch: model(...)"
    )


def check_loader(what: str, loader: Any, passes: int) -> None:
    """Raise unless batches can be taken from the loader, as many times as there are passes."""
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(f"{what}: loader must be an iterable of batches; got {describe(loader)}. One batch: [batch]")
    if passes > 1 and iter(loader) is loader:
        raise ValueError(
            f"{what}: sequential=True passes over the data once for each layer, so the loader must be able to start "
            f"again; got {type(loader).__name__}, which can be used once. Give a list or a DataLoader"
        )


@contextmanager
def passes_over(
    loader: Iterable[Any], most: int | None, progress: bool | None, what: str, passes: int = 1
) -> Iterator[Callable[[], Iterator[Any]]]:
    """Gives a function that starts a pass over the batches; a bar shows them, where it is wanted."""
    if most is not None and not is_count(most):
        raise ValueError(f"{what}: max_batches must be None or an integer from 1 on; got {describe(most)}")
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
