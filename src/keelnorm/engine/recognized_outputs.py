"""The outputs of batch norms in one call of a model: recognized when autograd saves them, and kept as recipes.

An output is recognized by its storage and its version. A weak reference keeps the storage's address from being given to
another one, and a tensor that was changed in place is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from keelnorm.engine.noted_steps import NotedStep
from keelnorm.engine.output_recipes import Held, Make, Packed, Recipe, View, layout_of, recipe_of
from keelnorm.engine.recomputation import is_running
from keelnorm.engine.torch_internals import saved_tensor_hooks


class Frame:
    """One call of a model, in which outputs are recognized.

    Args:
        module: The model.
        frame: The call's frame; hooks that a call left behind, as KeyboardInterrupt does, keep tensors as they are.
        longest: The longest chain of recipes; 0 keeps every output.
        record: Called with the tensor and what is kept for it, each time one is saved.
    """

    def __init__(
        self, module: nn.Module, frame: FrameType, longest: int, record: Callable[[Tensor, Packed], None] | None = None
    ) -> None:
        self.module, self.longest, self.record = module, longest, record
        self._frame: FrameType | None = frame
        self._known: dict[int, tuple[StorageWeakRef, int, Recipe]] = {}
        #: The operation that runs in `run_noted`: its first tensor, what that is computed from, and what it has saved.
        self._step: tuple[Tensor, Packed, list[Held]] | None = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()  # raises where hooks are disabled

    def runs(self) -> bool:
        """Return whether the call still runs: KeyboardInterrupt ends it unseen by hooks."""
        return self._frame is not None and is_running(self._frame)

    def is_of(self, caller: FrameType) -> bool:
        """Return whether a hook is called for this very call; after an exception torch does so from the outer frame."""
        return self._frame is not None and caller in (self._frame, self._frame.f_back)

    def close(self) -> None:
        """End the call: forget its outputs. What was kept for the backward stays."""
        self._frame, self._known = None, {}

    def is_on_top(self) -> bool:
        """Return whether no hooks of others were put on top of these."""
        top = saved_tensor_hooks(True)
        return top is not None and top[0] == self._pack

    def remove_hooks(self) -> bool:
        """Remove the hooks, unless others were put on top of them; return whether they are gone."""
        if not self.is_on_top():
            return False
        self._hooks.__exit__()
        return True

    def note(self, y: Tensor, make: Make, *given: Tensor | None) -> None:
        """Note how an output is computed; from recipes of what is given, unless the chain would become too long."""
        sources = tuple(None if each is None else self._source(each) for each in given)
        longest = _longest(sources)
        if longest >= self.longest:
            sources, longest = tuple(None if each is None else Held(each) for each in given), 0
        self._know(y, Recipe(y, make, sources, longest + 1))

    def note_after(self, y: Tensor, make: Make, outputs: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
        """Note how a copy is computed from outputs that are noted; without them it would take as much to keep them."""
        sources = tuple(map(self._source, (*outputs, *others)))
        if all(recipe_of(source) is not None for source in sources[: len(outputs)]):
            self._know(y, Recipe(y, make, sources, _longest(sources)))

    def run_noted(self, step: NotedStep) -> Any:
        """Run an operation on an output, and note how its result is computed."""
        sources = tuple(map(self._source, step.tensors))
        if recipe_of(sources[0]) is None:
            return step.run()
        saved: list[Held] = []
        self._step = step.tensors[0], sources[0], saved
        try:
            result = step.run()
        finally:
            self._step = None
        if type(result) is Tensor and result.dtype is step.tensors[0].dtype:
            recipe = Recipe(result, step.maker(), sources, _longest(sources))
            self._know(result, recipe)
            for held in saved:  # the result itself, as relu saves it before anyone can know how it is computed
                if held.version == result._version and _is_same(held.tensor, result):
                    recipe.save()
                    held.replace(recipe)
        return result

    def _know(self, y: Tensor, recipe: Recipe) -> None:
        storage = y.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage), y._version, recipe

    def _source(self, tensor: Tensor) -> Packed:
        recipe = self._recipe_of(tensor)
        if recipe is None:
            return Held(tensor)
        layout = layout_of(tensor)
        return recipe if layout == recipe.layout else View(recipe, layout)

    def _recipe_of(self, tensor: Tensor) -> Recipe | None:
        # Without a place in the graph it may be an alias by .data, whose version is its own.
        if tensor.grad_fn is None or tensor.is_inference() or tensor.is_nested or tensor.layout is not torch.strided:
            return None
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        _, version, recipe = known  # the weak reference keeps the address from being given to another storage
        same = tensor._version == version and tensor.dtype is recipe.dtype
        return recipe if same and not tensor.is_conj() and not tensor.is_neg() else None

    def _pack(self, tensor: Tensor) -> Packed:
        packed = self._source(tensor) if type(tensor) is Tensor and self.runs() else Held(tensor)
        if self._step is not None and isinstance(packed, Held):
            given, source, saved = self._step
            if _is_copy(tensor, given):  # relu6_ saves one of what it overwrites
                packed = source
            else:
                saved.append(packed)
        recipe = recipe_of(packed)
        if recipe is not None:
            recipe.save()
        if self.record is not None:
            self.record(tensor, packed)
        return packed


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same memory in the same layout."""
    if (
        one.layout is not torch.strided
        or one.is_nested
        or one.is_conj()
        or one.is_neg()
        or one.dtype is not other.dtype
    ):
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata and layout_of(one) == layout_of(other)


def _is_copy(one: Tensor, other: Tensor) -> bool:
    """Return whether a tensor has the values of another one, in memory of its own and in the same layout."""
    if one.layout is not torch.strided or one.is_nested or one.dtype is not other.dtype:
        return False
    apart = one.untyped_storage()._cdata != other.untyped_storage()._cdata
    if not apart or layout_of(one) != layout_of(other) or not torch.equal(one, other):
        return False
    return torch.equal(one.signbit(), other.signbit())  # 0 and −0 are equal


def _longest(sources: tuple[Packed | None, ...]) -> int:
    return max((recipe.length for recipe in map(recipe_of, sources) if recipe is not None), default=0)


def _unpack(packed: Packed) -> Tensor:
    return packed.get()
