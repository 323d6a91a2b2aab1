"""An operation of the user's on a batch norm's output, which the backward can repeat.

While a layer learns what follows it, activation and addition run by themselves. Their results then need not be kept
either: the same function computes them again from the recomputed output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from keelnorm.engine.output_recipes import Make


class NotedStep:
    """A call of a function of torch, value by value.

    Args:
        function: The function.
        args, kwargs: Its arguments.
        tensors: The output, and another tensor where the function takes one.
        inplace: Whether the first argument takes the result.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: tuple[Tensor, ...],
        inplace: bool,
    ) -> None:
        self.function, self.args, self.kwargs, self.tensors = function, args, kwargs, tensors
        self.inplace = inplace

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.args, **self.kwargs)

    def can_repeat(self) -> bool:
        """Return whether the call takes these tensors alone, and the output is the one that is written to."""
        given = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]
        known = all(any(value is tensor for tensor in self.tensors) for value in given)
        return known and (not self.inplace or self.args[0] is self.tensors[0])

    def maker(self) -> Make:
        """Return the function of the tensors alone, which keeps none of them."""
        function, inplace = self.function, self.inplace
        places = [_place(value, self.tensors) for value in self.args]
        named = {name: _place(value, self.tensors) for name, value in self.kwargs.items()}

        def make(*tensors: Tensor) -> Tensor:
            if inplace:  # others may read the recomputed output
                tensors = (tensors[0].clone(), *tensors[1:])
            args = (tensors[value] if there else value for there, value in places)
            keywords = {name: tensors[value] if there else value for name, (there, value) in named.items()}
            result: Tensor = function(*args, **keywords)
            return result

        return make


def _place(value: Any, tensors: tuple[Tensor, ...]) -> tuple[bool, Any]:
    """Return whether an argument is one of the tensors, and its place there; else the argument."""
    for place, tensor in enumerate(tensors):
        if value is tensor:
            return True, place
    return False, value
