"""The parts of a claim; each file in `claims/` that sets `CLAIM` is one."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.measure.page_parts import Figure, Table


@dataclass(frozen=True)
class Source:
    """Where a claim, or an objection to it, was published."""

    text: str
    url: str


@dataclass(frozen=True)
class EarlierCriterion:
    """A criterion that was changed after results had been seen.

    Args:
        changed: the date of the change.
        text: the criterion until then.
        why: the reason, in one sentence.
    """

    changed: str
    text: str
    why: str


@dataclass(frozen=True)
class Reading:
    """What a claim's results say.

    Args:
        answer: one sentence (two at most) made from the figures, never written before.
        findings: the effects with intervals that the verdict is computed from.
        figures, tables: what is shown; the first figure is the claim's own.
        setup: texts by term: data, networks, training, learning rates, metric, seeds.
        notes: what a reader has to know to read it right.
    """

    answer: str
    findings: Sequence[Finding]
    figures: Sequence[Figure]
    tables: Sequence[Table]
    setup: Mapping[str, str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """One claim about batch normalization, the work that tests it, and how the results are read.

    Args:
        number: its place in the list and on the page.
        title: two to five words.
        statement: the claim as commonly stated.
        question: the same as a question.
        literature: what the literature says for and against it, in a few sentences.
        sources: the publications.
        criterion: what would count as "holds", "depends" and "does not hold", in this claim's own terms.
        data: what it can use, the bundled default first: kinds of `keelnorm.lab.data`.
        earlier: criteria before that one, oldest first; `tests/lab/criteria.txt` holds that none is left out.
        cells: the work, for a plan.
        read: answers from whatever results there are; raises ValueError when too few cells have one.
    """

    number: int
    title: str
    statement: str
    question: str
    literature: str
    sources: Sequence[Source]
    criterion: str
    data: Sequence[str]
    cells: Callable[[Plan], Sequence[Cell]]
    read: Callable[[Plan, Results], Reading]
    earlier: Sequence[EarlierCriterion] = ()
    name: str = field(init=False)

    def sets(self, plan: Plan) -> list[str]:
        """The data sets that it uses: the bundled one, then those that the reader has."""
        return plan.data_sets(*self.data)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.read.__module__.rpartition(".")[2])


@cache
def claims() -> dict[str, Claim]:
    """All claims by name, in the order of their numbers."""
    package = import_module("keelnorm.lab.claims")
    found: list[Claim] = [
        import_module(f"{package.__name__}.{module.name}").CLAIM
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    ]
    return {claim.name: claim for claim in sorted(found, key=lambda claim: claim.number)}


def chosen(names: Sequence[str]) -> list[Claim]:
    """The claims of these names or numbers, in their own order; all where there is no name.

    Raises:
        ValueError: when a name is unknown; says which there are.
    """
    known = claims()
    numbers = {str(claim.number): claim.name for claim in known.values()}
    wanted = [numbers.get(name, name) for name in names]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        listed = ", ".join(f"{claim.number} {name}" for name, claim in known.items())
        raise ValueError(f"no claim is named {unknown[0]!r}; there are {listed}")
    return [claim for name, claim in known.items() if not names or name in wanted]
