"""A lambda that keeps what passes through it."""

from __future__ import annotations

from typing import Any, TypeVar

Value = TypeVar("Value")


def noted(values: list[Any], value: Value) -> Value:
    """The value, which is appended to the list as well."""
    values.append(value)
    return value
