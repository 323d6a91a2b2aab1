"""Check that clients' state_dicts and counts can be merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from keelnorm.engine.error_messages import describe

WHAT = "merge_statistics"
#: One client's number of values per channel: one number, or one for each batch norm.
Counts: TypeAlias = float | Sequence[float]


def check_states(states: list[Mapping[str, Any]]) -> None:
    """Raise unless there is a client, and all have the same keys, shapes and kinds of values."""
    if not states:
        raise ValueError(f"{WHAT}: needs the state_dict of at least one client; got none")
    for client, state in enumerate(states):
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{WHAT}: client {client} must be a state_dict, as from model.state_dict(); got {type(state)}"
            )
        for verb, keys in (("lacks", states[0].keys() - state.keys()), ("alone has", state.keys() - states[0].keys())):
            if keys:
                some = ", ".join(map(repr, sorted(keys)[:5])) + (", ..." if len(keys) > 5 else "")
                raise ValueError(f"{WHAT}: all clients need the keys of client 0; client {client} {verb} {some}")
        for key, value in state.items():
            mine = states[0][key]
            if isinstance(value, Tensor) != isinstance(mine, Tensor) or (
                isinstance(value, Tensor)
                and (value.shape != mine.shape or value.is_floating_point() != mine.is_floating_point())
            ):
                raise ValueError(
                    f"{WHAT}: {key!r} must have the same shape and kind in all clients; client 0 has {describe(mine)}, "
                    f"client {client} has {describe(value)}"
                )


def per_norm(counts: Sequence[Counts], clients: int, norms: int, least: int) -> list[list[float]]:
    """Make a table of counts with a row for each client and a column for each batch norm, or one column for none."""
    counts = counts.tolist() if isinstance(counts, Tensor | np.ndarray) else counts
    if not isinstance(counts, Sequence) or isinstance(counts, str) or len(counts) != clients:
        raise ValueError(f"{WHAT}: counts needs an entry for each of the {clients} clients; got {describe(counts)}")
    table = []
    for client, given in enumerate(counts):
        values: Any = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
        several = isinstance(values, Sequence) and not isinstance(values, str)
        row: list[Any] = list(values) if several else [values] * max(norms, 1)
        if several and len(row) != max(norms, 1):
            raise ValueError(
                f"{WHAT}: counts of client {client} must be a number or one for each of the {norms} batch norms; got "
                f"{len(row)} values"
            )
        try:
            row = [float(n) for n in row]
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"{WHAT}: counts of client {client} must be numbers; got {describe(given)}") from error
        if not all(math.isfinite(n) and n > 0 and n >= least * bool(norms) for n in row):
            raise ValueError(
                f"{WHAT}: counts of client {client} must be finite and positive, and at least 1 if running variances "
                f"are merged; got {describe(given)}"
            )
        table.append(row)
    return table
