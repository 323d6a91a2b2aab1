"""The batches that a diagnosis was given: that there are some, that they can be run again, and the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe, is_count
from keelnorm.surgery.observation.nested_tensors import map_tensors, tensors_in
from keelnorm.surgery.statistics.model_inputs import Forward, check_loader, run_batch

#: Samples that show what stands beside a layer; two, so that no dimension is 1 by chance.
_FEW = 2


class _Kept:
    """Batches of an iterator, which gives them once: those that were taken are kept."""

    def __init__(self, rest: Iterator[Any]) -> None:
        self._rest = rest
        self._taken: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while True:
            if index == len(self._taken):
                try:
                    self._taken.append(next(self._rest))
                except StopIteration:
                    return
            yield self._taken[index]
            index += 1


class Batches:
    """Batches of data, and how the model is run on one.

    Args:
        given: An iterable of batches. The batches of an iterator are kept, so that they can be run again.
        forward: ``forward(model, batch)``, for batches that ``kn.recalibrate`` can't run by itself; None for others.
        most: The largest number of batches; None for all.

    Raises:
        TypeError: It is no iterable of batches.
        ValueError: It has no batch, or ``most`` is not legal.
    """

    def __init__(self, given: Any, forward: Forward | None = None, most: int | None = None) -> None:
        if isinstance(given, Mapping):
            raise RefusedTypeError(
                "diagnose: batches must be an iterable of batches; got a mapping, which is one. Pass [batch]"
            )
        try:
            check_loader("diagnose", given, 1)
        except TypeError as error:
            raise RefusedTypeError(str(error).replace("loader must", "batches must")) from None
        if most is not None and not is_count(most):
            raise RefusedValueError(f"diagnose: max_batches must be None or a positive integer; got {describe(most)}")
        self.all: Iterable[Any] = _Kept(given) if isinstance(given, Iterator) else given
        self.forward: Forward | None = forward
        self.most: int | None = most
        try:
            self.first: Any = next(iter(self.all))
        except StopIteration:
            raise RefusedValueError(
                "diagnose: batches is empty. Pass a list of batches or a DataLoader; an iterator that was used up "
                "before gives none"
            ) from None

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.all), self.most)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch."""
        return run_batch(model, batch) if self.forward is None else self.forward(model, batch)

    @property
    def samples(self) -> int | None:
        """The number of samples in the first batch; None where its tensors do not agree on it."""
        return self.samples_of(self.first)

    @staticmethod
    def samples_of(batch: Any) -> int | None:
        """The number of samples in a batch; None where its tensors do not agree on it."""
        tensors = tensors_in(batch if not isinstance(batch, tuple | list) else batch[:1])
        sizes = {tensor.shape[0] for tensor in tensors if tensor.ndim > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def few(self) -> Any | None:
        """The first samples of the first batch; None where it can't be told how to take them apart."""
        if self.forward is not None or not isinstance(self.first, Tensor | Sequence | Mapping):
            return None
        tensors = tensors_in(self.first)
        if any(tensor.ndim == 0 for tensor in tensors) or len({len(tensor) for tensor in tensors}) != 1:
            return None
        return map_tensors(lambda tensor: tensor[:_FEW], self.first)
