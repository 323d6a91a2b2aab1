"""What a run was asked for: how thorough it is, and on which data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

MOST_SEEDS = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a run was asked for.

    Args:
        quick: coarser grids, shorter training and fewer seeds, for a first look.
        seeds: how many, in place of each claim's own number; None: each claim's own.
        data: identities of the data sets that were found in the reader's folder, such as "mnist@1f0c…"
            (see `keelnorm.lab.data.data_folder`); what is bundled is not among them.
    """

    quick: bool = True
    seeds: int | None = None
    data: tuple[str, ...] = ()

    def data_sets(self, default: str, *more: str) -> list[str]:
        """The data sets that a claim uses: the bundled one, then those of `more` that the reader has.

        Example:
            >>> Plan(data=("mnist@1f0c", "speech@77aa")).data_sets("digits", "mnist", "images")
            ['digits', 'mnist@1f0c']
        """
        return [default, *(own for kind in more for own in self.data if kind_of(own) == kind)]


@dataclass(frozen=True)
class ByForm(Generic[T]):
    """What a claim takes in quick form and in full form, such as learning rates or steps."""

    quick: T
    full: T

    def of(self, plan: Plan) -> T:
        """The one for the plan's form."""
        return self.quick if plan.quick else self.full


@dataclass(frozen=True)
class Seeds:
    """How many seeds a claim takes in quick form and in full form."""

    quick: int
    full: int

    def of(self, plan: Plan) -> range:
        """The seeds of a plan, which may ask for another number."""
        return range(plan.seeds if plan.seeds is not None else self.quick if plan.quick else self.full)


def kind_of(identity: str) -> str:
    """The kind of data set that an identity names: "mnist@1f0c" is "mnist"."""
    return identity.partition("@")[0]


LONGER = 4
"""How many times as many steps larger images get, where a claim asks how many steps a network needs."""


def steps_for(data: str, steps: int) -> int:
    """The steps of a training run that takes this many on digits."""
    return steps if kind_of(data) == "digits" else LONGER * steps


def seeds_text(seeds: Sequence[object]) -> str:
    """How many seeds, and what a seed is."""
    few = "" if len(seeds) >= 5 else "; fewer than five: read the intervals with care"
    return (
        f"{len(seeds)}, each a split, an initialization and an order of the samples that all arms share; "
        f"intervals are 95 % t-intervals over seeds{few}"
    )
