"""Save the state of a model and put it back: every operation that undoes something uses these blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from keelnorm.engine.rollback import Gradients, Unchanged
from keelnorm.surgery.observation.call_record import version_of
from keelnorm.surgery.observation.nested_tensors import tensors_in


class _Structure:
    """A module's class and attributes, and the contents of its tables of parameters, buffers, submodules and hooks."""

    def __init__(self, module: Module) -> None:
        self._module, self._class, self._attributes = module, module.__class__, dict(vars(module))
        self._tables = [(t, t.copy()) for t in self._attributes.values() if type(t) in (dict, OrderedDict)]

    def restore(self) -> None:
        module, graph = self._module, vars(self._module).get("_graph")
        module.__class__ = self._class
        vars(module).clear()
        vars(module).update(self._attributes)
        for table, contents in self._tables:
            table.clear()
            table.update(contents)
        if isinstance(module, fx.GraphModule) and module.graph is not graph:
            module.graph = module.graph  # compiles the forward again


@contextmanager
def all_or_nothing(modules: Iterable[Module], tensors: Iterable[Tensor | None] = ()) -> Iterator[None]:
    """If the block raises, put back modules and the values of tensors.

    Args:
        modules: Their classes, attributes, parameters, buffers, submodules and hooks become the same objects again.
        tensors: Their values are put back, bit for bit.
    """
    before = [_Structure(module) for module in modules]
    with Unchanged(tensors):
        try:
            yield
        except BaseException:
            for structure in before:
                structure.restore()
            raise


@contextmanager
def _modes_kept(model: Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def in_evaluation(model: Module) -> Iterator[None]:
    """Run the block with all modules in evaluation mode; afterwards each has its mode again."""
    with _modes_kept(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def training_only(parameters: Iterable[Parameter], model: Module) -> Iterator[None]:
    """Let these parameters alone require gradients; afterwards each ``requires_grad`` and ``grad`` is as before."""
    before = Gradients(model.parameters())
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        before.restore()


@contextmanager
def preserved(model: Module, given: Any = ()) -> Iterator[None]:
    """Run the block without gradients; afterwards put back buffers, modes, random generators and arguments' values.

    Args:
        model: Whose buffers and modes are put back.
        given: The arguments of the model's call, in any container.
    """
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = {value for _, named in buffers for value in named.values() if value is not None and not is_lazy(value)}
    copies = {value: value.detach().clone() for value in values}
    arguments = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in tensors_in(given)]
    devices = {value.device.index for value in (*model.parameters(), *values) if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad(), _modes_kept(model):
        try:
            yield
        finally:
            for table, contents in buffers:
                table.clear()
                table.update(contents)
            for value, copy in copies.items():
                value.copy_(copy)
            for tensor, version, copy in arguments:
                if tensor._version != version:  # an expanded tensor can't be written to, and has not been
                    tensor.copy_(copy)


def copy_values(module: Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of a module's buffers and parameters, by name; those that it does not have are left out."""
    found = {name: getattr(module, name, None) for name in names}
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def put_back(module: Module, copies: Mapping[str, Tensor]) -> None:
    """Write the values of :func:`copy_values` into the module's buffers and parameters."""
    with torch.no_grad():
        for name, value in copies.items():
            getattr(module, name).copy_(value)
