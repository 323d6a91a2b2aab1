"""Read plain data, as JSON gives it, into dataclasses, and check every type."""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def read_report(kind: Any, text: str, schema: int, what: str) -> Any:
    """Read a report from JSON text.

    Args:
        kind: The dataclass, with a field ``schema``.
        text: What was stored.
        schema: The schema that it must have.
        what: The kind of report, for error messages.

    Raises:
        ValueError: The text has another schema, or does not hold what such a report does.
    """
    try:
        data: Any = json.loads(text)
        there = data.get("schema") if isinstance(data, dict) else None
        if there != schema:
            raise ValueError(f"expected {what} of schema {schema}, got {there!r}")
        return read(kind, data)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def read(kind: Any, value: Any, where: str = "it") -> Any:
    """Read a value as a dataclass, a list, a dict, a union, or a plain type.

    Args:
        kind: The type.
        value: Plain data.
        where: The name of the value in error messages.

    Raises:
        ValueError: The value has another type; the message says where.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        fields = {
            name: read(hints.get(name), each, f"{where}.{name}") for name, each in _of(dict, value, where).items()
        }
        try:
            return kind(**fields)  # type: ignore[operator]
        except TypeError as error:  # a field is missing
            raise ValueError(f"{where}: {error}") from None
    if origin is list:
        return [read(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(_of(list, value, where))]
    if origin is dict:
        return {name: read(arguments[1], each, f"{where}[{name!r}]") for name, each in _of(dict, value, where).items()}
    if origin in (Union, UnionType):
        kinds = [each for each in arguments if each is not NoneType]
        return None if value is None else read(kinds[0], value, where)
    if kind is float:
        number = float(_of((int, float), value, where))
        if not math.isfinite(number):
            raise ValueError(f"{where} is {number}")
        return number
    if kind is None:
        raise ValueError(f"{where} is unknown")
    return _of(kind, value, where)


def _of(kind: type | tuple[type, ...], value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where} is a {type(value).__name__}, not a {wanted}")
    return value
