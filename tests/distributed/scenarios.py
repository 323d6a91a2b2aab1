"""What the ranks do; each scenario runs on every rank of its own processes, and returns what tests look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pooling_scenarios import moments, pooling
from saving import saving
from sync_scenarios import compiled, four, many, parallel, subgroups, two
from unlike_scenarios import dying, environment, flights, silent, unlike


class Scenario(NamedTuple):
    run: Callable[[], Any]
    ranks: int
    timeout: float = 30.0


SCENARIOS = {
    "two": Scenario(two, 2),
    "four": Scenario(four, 4),
    "subgroups": Scenario(subgroups, 4),
    "parallel": Scenario(parallel, 2),
    "many": Scenario(many, 2),
    "compiled": Scenario(compiled, 2),
    "flights": Scenario(flights, 3),
    "unlike": Scenario(unlike, 3),
    "dying": Scenario(dying, 2, timeout=5.0),
    "silent": Scenario(silent, 2, timeout=1.0),
    "pooling": Scenario(pooling, 3),
    "moments": Scenario(moments, 3),
    "environment": Scenario(environment, 2),
    "saving": Scenario(saving, 2),
}
