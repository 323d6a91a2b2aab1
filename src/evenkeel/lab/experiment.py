"""What an experiment is. Adding one is adding a file to `experiments/` that sets `EXPERIMENT`."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from evenkeel.lab.cell import Cell, Results
from evenkeel.lab.figures import Section

FULL_SEEDS = 5
QUICK_SEEDS = 3


@dataclass(frozen=True)
class Plan:
    """How thoroughly to look.

    Args:
        seeds: how many, from 0; each is a split, an initialization and an order of the samples.
        quick: coarser grids and shorter training, for a first look.
    """

    seeds: int
    quick: bool = False

    @classmethod
    def fully(cls, seeds: int | None = None) -> Plan:
        """The plan that the page is meant for."""
        return cls(FULL_SEEDS if seeds is None else seeds)

    @classmethod
    def quickly(cls, seeds: int | None = None) -> Plan:
        """A first look."""
        return cls(QUICK_SEEDS if seeds is None else seeds, quick=True)


class Experiment(Protocol):
    """A question, the cells that answer it, and how their results are read."""

    name: str
    """The name of its file; what `--only` takes."""
    title: str
    question: str
    order: int
    """Its place on the page."""

    def cells(self, plan: Plan) -> Sequence[Cell]:
        """The work."""

    def read(self, plan: Plan, results: Results) -> Section:
        """Answer, measures, figures and tables from whatever results there are.

        Raises:
            ValueError: when too few cells have a result to say anything.
        """


def experiments() -> dict[str, Experiment]:
    """All experiments by name, in the order of the page."""
    package = import_module("evenkeel.lab.experiments")
    found: list[Experiment] = [
        import_module(f"{package.__name__}.{module.name}").EXPERIMENT
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return {experiment.name: experiment for experiment in sorted(found, key=lambda e: e.order)}
