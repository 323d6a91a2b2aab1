"""The whole laboratory: run claims, or report on what is stored of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelnorm.lab.core.claim import Claim, chosen
from keelnorm.lab.core.plan import MOST_SEEDS, Plan
from keelnorm.lab.core.runner import Listener, run, stored
from keelnorm.lab.core.store import Store
from keelnorm.lab.reading.document import document

TITLE = "Batch normalization: what is said, and what is measured"
DEMO_TITLE = "Batch normalization on handwritten digits"
DEMO = ("convergence", "learning_rate", "initialization", "inference", "small_batches", "cost_removed")
"""The claims of `keelnorm demo`."""


@dataclass(frozen=True)
class Order:
    """What was asked for.

    Args:
        claims: which claims; a page has them in their own order.
        plan: how thoroughly, at which data.
        folder: the reader's data; None: what is bundled.
        demo: whether it was asked for as `keelnorm demo`.
    """

    claims: Sequence[Claim]
    plan: Plan
    folder: Path | None = None
    demo: bool = False

    @property
    def title(self) -> str:
        """The heading of the page."""
        return DEMO_TITLE if self.demo else TITLE

    def command(self) -> str:
        """What to type to run it again, without the claims' names."""
        if self.demo:
            return "keelnorm demo" + ("" if self.plan.seeds is None else f" --seeds {self.plan.seeds}")
        words = ["keelnorm lab run", "--quick" if self.plan.quick else "--full"]
        if self.plan.seeds is not None:
            words.append(f"--seeds {self.plan.seeds}")
        if self.folder is not None:
            words.append(f"--data-dir {shlex.quote(str(self.folder))}")
        return " ".join(words)

    def plain(self) -> dict[str, Any]:
        """The order as JSON can hold it."""
        return {
            "claims": [claim.name for claim in self.claims],
            "quick": self.plan.quick,
            "seeds": self.plan.seeds,
            "data": list(self.plan.data),
            "folder": None if self.folder is None else str(self.folder),
            "demo": self.demo,
        }


def order_from(plain: dict[str, Any]) -> Order:
    """The order that `Order.plain` wrote.

    Raises:
        ValueError: it wrote no such thing, or for other claims.
    """
    try:
        folder = None if plain["folder"] is None else Path(plain["folder"])
        plan = Plan(quick=plain["quick"], seeds=plain["seeds"], data=tuple(plain["data"]))
        order = Order(chosen(plain["claims"]), plan, folder, demo=plain["demo"])
        if plan.seeds is not None and plan.seeds not in range(MOST_SEEDS + 1):
            raise ValueError(f"it asks for {plan.seeds!r} seeds")
        if order.plain() != plain:  # other fields, or an order of other types
            raise ValueError("it was not written by this version")
        for claim in order.claims:
            claim.cells(plan)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"what was asked for can't be read there ({type(error).__name__}: {error})") from None
    return order


def run_order(
    order: Order, store: Store, *, jobs: int | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Run what the store lacks, and return the document (see `keelnorm.lab.reading.document`)."""
    store.remember(order.plain())
    cells = [cell for claim in order.claims for cell in claim.cells(order.plan)]
    outcome = run(cells, store, jobs=jobs, folder=order.folder, listener=listener)
    return document(order.title, order.claims, order.plan, outcome, command=order.command())


def report_order(order: Order, store: Store) -> dict[str, Any]:
    """The document of what is stored. Nothing is run."""
    cells = [cell for claim in order.claims for cell in claim.cells(order.plan)]
    return document(order.title, order.claims, order.plan, stored(cells, store), command=order.command())


def results_beside(page: Path) -> Path:
    """Where the results of a page are kept: beside it, by the same name."""
    return page.with_suffix(".jsonl")
