"""A forward that is run to be traced has to leave the module, and the generators of random numbers, as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


class UntraceableError(Exception):
    """Why a forward can't be traced, in words that follow "can't be traced: "."""


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what a forward has changed on the way, and refuse it."""
    before = [(m, dict(m.__dict__), {name: _content(value) for name, value in m.__dict__.items()})
              for m in module.modules()]  # fmt: skip
    states = [get() for get, _ in _GENERATORS]
    changed = None
    try:
        yield
    finally:
        for m, attributes, contents in before:
            now = m.__dict__
            if now.keys() != attributes.keys() or any(now[name] is not value for name, value in attributes.items()):
                changed = "it sets attributes on the way"
                now.clear()
                now.update(attributes)
            for name, content in contents.items():
                if content is not None and list(map(id, content)) != list(map(id, _content(attributes[name]) or ())):
                    changed = f"it changes its {name!r} on the way"
                    _refill(attributes[name], content)
        for state, (get, put) in zip(states, _GENERATORS, strict=True):
            if not _same(state, get()):
                changed = "it draws random numbers, which the graph would not"
                put(state)
    if changed is not None:
        raise UntraceableError(changed)


def _refill(container: Any, content: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(zip(content[::2], content[1::2], strict=True))
    else:
        (container.extend if isinstance(container, list) else container.update)(content)


def _content(value: Any) -> list[Any] | None:
    """What a container holds, to be put back; None for what is none."""
    if type(value) in (list, set):
        return list(value)
    return [part for item in value.items() for part in item] if isinstance(value, dict) else None


#: What reads a generator's state, and what sets it.
_GENERATORS: tuple[tuple[Any, Any], ...] = (
    (random.getstate, random.setstate),
    (torch.get_rng_state, torch.set_rng_state),
    (np.random.get_state, np.random.set_state),
)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
