"""The example on corrupted digits runs, at a size that is only big enough to run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapt_digits.py"


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](["--quick"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^  clean +\d+\.\d \[", said, re.MULTILINE)) == 5
    assert len(re.findall(r"% of the loss recovered$", said, re.MULTILINE)) == 6 * 6
