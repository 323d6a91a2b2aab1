"""Parts of error messages: descriptions of values, checks, and the paths of modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch

from keelnorm.engine.torch_internals import compiler

#: The most characters of a value that an error shows; a state_dict's repr would fill many screens.
_LONGEST = 200


class RefusedError(Exception):
    """An operation refuses its arguments or the model.

    The message begins with the operation's name and says all: what came, what is legal, what to do. Raised as one of
    the subclasses.
    """


class RefusedTypeError(RefusedError, TypeError):
    """An argument is of the wrong kind."""


class RefusedValueError(RefusedError, ValueError):
    """An argument is of the right kind and not legal."""


class RefusedRuntimeError(RefusedError, RuntimeError):
    """The model, or what it computes, does not allow the operation."""


def describe(value: Any) -> str:
    """Describe a value: a tensor's dtype, shape and device, or another object's type and value.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a float32 tensor of shape (2, 3) on cpu'
        >>> describe("x")
        "'x' (str)"
        >>> describe(torch.nn.Linear(9, 9).state_dict())
        'an OrderedDict of 2 entries'
    """
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        article = "an" if dtype[0] in "aeiou" else "a"
        if value.is_nested:
            return f"{article} {dtype} nested tensor of {value.size(0)} parts on {value.device}"
        layout = "" if value.layout is torch.strided else str(value.layout).removeprefix("torch.").lstrip("_") + " "
        return f"{article} {dtype} {layout}tensor of shape {tuple(value.shape)} on {value.device}"
    if value is None:
        return "None"
    kind, text = type(value).__name__, repr(value)
    if len(text) <= _LONGEST:
        return f"{text} ({kind})"
    if isinstance(value, Sized) and not isinstance(value, str | bytes):
        return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind} of {len(value)} entries"
    return f"{text[:_LONGEST]}... ({kind})"


def shortened(names: Sequence[str], most: int = 8) -> str:
    """List names, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_module(what: str, model: Any) -> None:
    """Raise a TypeError unless ``model`` is a module."""
    if not isinstance(model, torch.nn.Module):
        hint = ". A state_dict has no layers: load it into its model first" if isinstance(model, Mapping) else ""
        raise RefusedTypeError(f"{what}: model must be a torch.nn.Module; got {describe(model)}{hint}")


def check_tolerance(what: str, tolerance: Any) -> None:
    """Raise unless ``tolerance`` is None or a number of at least 0."""
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance >= 0):
        raise RefusedValueError(f"{what}: tolerance must be None or a number of at least 0; got {describe(tolerance)}")


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least ``least`` and below 2**31."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def module_path(module: torch.nn.Module) -> str | None:
    """The path of a module in the running model, as "layer1.0.bn1"; None where no model is running.

    Found from the frames of the stack, which is slow: use it for errors only.
    """
    path, frame = None, sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and owner is not module:
            path = next((name for name, child in owner.named_modules() if child is module), path)
        frame = frame.f_back  # type: ignore[assignment]
    return path


def locate(error: Exception, module: torch.nn.Module) -> None:
    """Add the module's path to an error message that begins with its class name."""
    dynamo = compiler()  # it can't trace through frames
    find = module_path if dynamo is None else dynamo.disable(module_path)
    path, what = find(module), type(module).__name__
    if path and error.args and str(error.args[0]).startswith(f"{what}: "):
        error.args = (f"{what} {path!r}{str(error.args[0])[len(what) :]}", *error.args[1:])
