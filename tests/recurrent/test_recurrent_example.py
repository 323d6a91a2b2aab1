"""The example runs, at a size that is only big enough to run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "recurrent.py"
NUMBER = r"-?\d+\.\d{3}"


@pytest.mark.parametrize("normalize", ["recurrent", "input"])
def test_it_runs(normalize: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--quick", "--seeds", "1", "--steps", "3", "--normalize", normalize])
    said = capsys.readouterr().out
    assert len(re.findall(rf"^  difference +{NUMBER} \[one seed\] +one seed says nothing$", said, re.MULTILINE)) == 2
    plain, ours = (float(re.search(rf"  {arm} +({NUMBER})", said)[1]) for arm in ("LSTM", r"(?:BatchNormLSTM|input)"))
    assert 3 < plain < 8  # bits per character: 7 for all 128 alike
    assert 3 < ours < 8


def test_two_seeds_give_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--quick", "--seeds", "2", "--steps", "2", "--only", "rows"])
    said = capsys.readouterr().out
    found = re.search(rf"difference +({NUMBER}) \[({NUMBER}), ({NUMBER})\] +(not )?resolved", said)
    assert found, said
    value, low, high = map(float, found.groups()[:3])
    assert low <= value <= high
    assert bool(found[4]) == (low <= 0 <= high)
