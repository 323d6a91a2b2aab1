"""`evenkeel lab run` with one claim whose cells never end; each leaves its number in EVENKEEL_TEST_STARTED."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fakes import fake_claim

from evenkeel.lab.core import claim
from evenkeel.lab.core.cell import Cell


def sleeps(*, seed):
    Path(os.environ["EVENKEEL_TEST_STARTED"], str(seed)).touch()
    time.sleep(600)


def cells(plan):
    return [Cell(sleeps, {"seed": seed}) for seed in range(8)]


if __name__ == "__main__":
    import sleeping  # by its own name, so that workers find it

    from evenkeel.cli import main

    made = fake_claim(cells=sleeping.cells)
    claim.claims = lambda: {made.name: made}
    main()
