"""`keelnorm lab run` with one claim whose cells never end; each leaves its number in KEELNORM_TEST_STARTED."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fakes import fake_claim

from keelnorm.lab.core import claim
from keelnorm.lab.core.cell import Cell


def sleeps(*, seed):
    Path(os.environ["KEELNORM_TEST_STARTED"], str(seed)).touch()
    time.sleep(600)


def cells(plan):
    return [Cell(sleeps, {"seed": seed}) for seed in range(8)]


if __name__ == "__main__":
    import sleeping  # by its own name, so that workers find it

    from keelnorm.cli import main

    made = fake_claim(cells=sleeping.cells)
    vars(claim)["claims"] = lambda: {made.name: made}
    main()
