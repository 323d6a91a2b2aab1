"""Calls of the fast operators, the native and Triton ones, and what follows where they decline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from keelnorm.engine.arguments import State, check_arguments
from keelnorm.engine.kernels import registry
from keelnorm.engine.torch_internals import increment_version
from keelnorm.engine.update_counts import COUNTS

#: How the message of a declining operator begins. LibTorch's stable ABI passes on no class of exceptions, so the text
#: is all that arrives; it is read in :func:`_declined` alone.
_UNSUPPORTED = "keelnorm: unsupported: "
_log = logging.getLogger("keelnorm")
#: The arguments for which operators declined in this process, each announced once.
_announced: set[str] = set()


def run_fast(name: str, x: Tensor, *arguments: Any, check: tuple[Any, ...] | None = None) -> Any:
    """Run a fast operator, or return None where the reference back end has to run.

    Args:
        name: The operator's, see `engine.ops`.
        x: The tensor whose device and dtype choose the kernels.
        arguments: The operator's.
        check: Arguments of :func:`check_arguments`, which raises where they are illegal and not only unusual.
    """
    fast = registry.operators(x)
    if fast is None:
        return None
    try:  # as attempt does, without a second call
        return getattr(fast, name)(*arguments)
    except RuntimeError as error:
        _handle(error, check)
        return None


def attempt(run: Callable[..., Any], *arguments: Any) -> Any:
    """Call what runs a fast operator; return None where the operator declines the arguments."""
    try:
        return run(*arguments)
    except RuntimeError as error:
        _handle(error, None)
        return None


def _handle(error: RuntimeError, check: tuple[Any, ...] | None) -> None:
    """Raise the error again, unless an operator declined, which is announced once with the reason.

    An operator declines before it writes anything.
    """
    reason = _declined(error)
    if reason is None:
        raise error
    if check is not None:
        check_arguments(*check)
    _announce(reason)


def _declined(error: RuntimeError) -> str | None:
    """Return the argument for which an operator declined; "" where it has no kernel, None for any other error."""
    _, declined, reason = str(error).partition(_UNSUPPORTED)
    if declined:
        return reason.partition("\n")[0].strip()
    return "" if isinstance(error, NotImplementedError) else None


def _announce(reason: str) -> None:
    """Log once for each argument that the reference back end runs because of it.

    Two are not announced: "x" alone, which is empty then, and the update counts, which the reference corrects, so that
    it runs only this once.
    """
    if reason in ("", "x", COUNTS) or reason in _announced:
        return
    _announced.add(reason)
    _log.warning(
        "the fast kernels do not take this dtype or layout of %s: the reference back end runs, which is slower", reason
    )


def mark_updated(state: State, *others: Tensor) -> None:
    """Tell autograd what a fast operator has overwritten: updated running statistics, and others."""
    changed = [*others]
    if state.update and state.running_mean is not None:
        counts = None if state.updates is None else state.updates.tensor
        for buffer in (state.running_mean, state.running_var, state.num_batches_tracked, counts):
            if buffer is not None and not buffer.is_inference():
                changed.append(buffer)
    increment_version(changed)
