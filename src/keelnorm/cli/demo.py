"""The command `keelnorm demo`: a few claims in quick form."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from keelnorm.cli._shared.common_options import AsJson
from keelnorm.cli._shared.failures import need
from keelnorm.cli._shared.laboratory_options import Fresh, Jobs, Page, Seeds
from keelnorm.cli._shared.laboratory_run import PACKAGES, measure


def demo_command(
    out: Page = Path("keelnorm-demo.html"),
    seeds: Seeds = None,
    jobs: Jobs = None,
    fresh: Fresh = False,
    reuse_memory: Annotated[
        bool, typer.Option("--reuse-memory", help="Keep the memory of freed tensors, in this process only.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show on real data what batch normalization does: a few of the laboratory's claims.

    Trains small networks on scikit-learn's handwritten digits and prints a verdict for each claim.
    Writes one HTML page with interactive plots that needs no network. `keelnorm lab run` measures all claims.
    """
    need("lab", *PACKAGES)
    from keelnorm.lab.core.claim import chosen
    from keelnorm.lab.core.laboratory import DEMO, Order
    from keelnorm.lab.core.plan import Plan
    from keelnorm.memory import reuse_memory as reused_memory

    order = Order(chosen(DEMO), Plan(quick=True, seeds=seeds), demo=True)
    around = reused_memory() if reuse_memory else nullcontext()
    measure(order, out, jobs=jobs, fresh=fresh, as_json=as_json, around=around)
