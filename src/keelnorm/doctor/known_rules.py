"""All rules: those of the folder ``rules``, and those of other packages; and the choice among them."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, NamedTuple

from keelnorm.doctor.rule import Rule
from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe

#: The group of entry points by which other packages add rules.
GROUP = "keelnorm.doctor"


class Registry(NamedTuple):
    """The rules that there are.

    Args:
        rules: By identifier, in the order of the identifiers.
        problems: Sentences about entry points whose rules could not be loaded.
    """

    rules: dict[str, Rule]
    problems: list[str]


@cache
def own_rules() -> dict[str, Rule]:
    """The rules of keelnorm by identifier: every module of the folder ``rules`` that sets ``RULE``."""
    package = import_module("keelnorm.doctor.rules")
    modules = [import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    found = [module.RULE for module in modules if hasattr(module, "RULE")]
    names = [rule.id for rule in found] + [rule.name for rule in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RuntimeError(f"two rules are called {', '.join(twice)}")
    return {rule.id: rule for rule in sorted(found, key=lambda rule: rule.id)}


def all_rules() -> Registry:
    """The rules of keelnorm and of other packages. An entry point that fails is a sentence in ``problems``."""
    rules, problems = dict(own_rules()), []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            for rule in _rules_of(point):
                taken = {one.id for one in rules.values()} | {one.name for one in rules.values()}
                if {rule.id, rule.name} & taken:
                    raise ValueError(f"there is a rule {rule.id} or {rule.name!r} already")
                rules[rule.id] = rule
        except Exception as error:  # the code of another package may raise anything
            problems.append(
                f"The rules of the entry point {point.name!r} ({point.value}) were left out: "
                f"{type(error).__name__}: {error}"
            )
    return Registry(dict(sorted(rules.items())), problems)


def chosen(what: str, select: Any = None, ignore: Any = None, registry: Registry | None = None) -> list[Rule]:
    """The rules that ``select`` names and ``ignore`` does not; None selects all, and ignores none.

    Args:
        what: What was called, the first words of an error.
        select: Identifiers, names or beginnings of identifiers ("KN1"): one, several, or joined by commas.
        ignore: The same.
        registry: The rules; by default all.

    Raises:
        TypeError: ``select`` or ``ignore`` is no string and no list of them.
        ValueError: A word fits no rule, or no rule is left.
    """
    rules = (registry or all_rules()).rules
    taken = set(rules) if select is None else _named(what, "select", select, rules)
    left = taken - (set() if ignore is None else _named(what, "ignore", ignore, rules))
    if not left:
        raise RefusedValueError(f"{what}: no rule is left of select={select!r} and ignore={ignore!r}. {_listed(rules)}")
    return [rule for name, rule in rules.items() if name in left]


def rules_named(what: str, argument: str, word: str, rules: dict[str, Rule]) -> set[str]:
    """The identifiers of the rules that a word means: an identifier, a name, or the beginning of identifiers.

    Raises:
        ValueError: It fits none.
    """
    found = {name for name, rule in rules.items() if word in (name, rule.name)}
    found = found or {name for name in rules if word and name.startswith(word)}
    if not found:
        raise RefusedValueError(f"{what}: {argument} names {word!r}, which is no rule. {_listed(rules)}")
    return found


def words_of(what: str, argument: str, given: Any) -> list[str]:
    """The words of an argument that is one string, with commas or without, or several.

    Raises:
        TypeError: It is something else.
    """
    words = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(word, str) for word in words):
        raise RefusedTypeError(f"{what}: {argument} takes names of rules, as a string or a list; got {describe(given)}")
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def _named(what: str, argument: str, given: Any, rules: dict[str, Rule]) -> set[str]:
    words = words_of(what, argument, given)
    return set().union(*(rules_named(what, argument, word, rules) for word in words))


def _listed(rules: dict[str, Rule]) -> str:
    return "There are " + ", ".join(f"{name} {rule.name}" for name, rule in rules.items())


def _rules_of(point: EntryPoint) -> Iterator[Rule]:
    """The rules that an entry point gives: a Rule, a module that sets RULE, or several of these."""
    found = point.load()
    for part in found if isinstance(found, list | tuple) else [found]:
        rule = getattr(part, "RULE", None) if isinstance(part, ModuleType) else part
        if not isinstance(rule, Rule):
            raise TypeError(f"it gives {describe(part)}; a keelnorm.doctor.Rule, or a module that sets RULE, is legal")
        yield rule
