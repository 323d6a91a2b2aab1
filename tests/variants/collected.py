"""Every variant of the ``cases_*.py`` next to this file, and the decorators that put a test to each of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from variants.variant import Variant

Test = TypeVar("Test", bound=Callable[..., Any])

HERE = Path(__file__).parent


def collect(folder: Path = HERE, package: str = "variants") -> list[Variant]:
    """The variants of all case files. One that can't be imported, or lists none, is an error; so is none at all."""
    found: list[Variant] = []
    for path in sorted(folder.glob("cases_*.py")):
        listed = importlib.import_module(f"{package}.{path.stem}").VARIANTS
        if not listed:
            raise ValueError(f"{path.name}: VARIANTS is empty")
        found += listed
    if not found:
        raise ValueError(f"there is no cases_*.py in {folder}, so the contract would be asked of nothing")
    names = [variant.name for variant in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two variants have the same name: {sorted(name for name in names if names.count(name) > 1)}")
    return found


VARIANTS = collect()


def small(variant: Variant) -> tuple[int, ...]:
    """The first legal shape."""
    return variant.shapes[0]


def largest_rank(variant: Variant) -> tuple[int, ...]:
    """The legal shape of most dimensions."""
    return max(variant.shapes, key=len)


def for_each(where: Callable[[Variant], bool] = lambda variant: True) -> Callable[[Test], Test]:
    """Put a test to each variant, as its argument ``variant``."""

    def decorate(test: Test) -> Test:
        params = [pytest.param(v, id=v.name, marks=_unkept(v, test)) for v in VARIANTS if where(v)]
        return pytest.mark.parametrize("variant", params)(test)

    return decorate


def for_each_shape(
    where: Callable[[Variant, tuple[int, ...]], bool] = lambda variant, shape: True,
) -> Callable[[Test], Test]:
    """Put a test to each variant with each of its shapes, as its arguments ``variant`` and ``shape``."""

    def decorate(test: Test) -> Test:
        params = [
            pytest.param(v, shape, id=f"{v.name}-{'x'.join(map(str, shape))}", marks=_unkept(v, test))
            for v in VARIANTS
            for shape in v.shapes
            if where(v, shape)
        ]
        return pytest.mark.parametrize(("variant", "shape"), params)(test)

    return decorate


def _unkept(variant: Variant, test: Callable[..., Any]) -> list[pytest.MarkDecorator]:
    reason = variant.unkept.get(test.__name__)
    return [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]


def unknown_promises(variant: Variant, promises: set[str]) -> Iterator[str]:
    """The names in ``unkept`` that no test has, which would promise less without anyone noticing."""
    return (name for name in variant.unkept if name not in promises)
