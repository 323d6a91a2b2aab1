"""A run that is killed at any moment goes on, and ends with the same page."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

CLAIMS = ["convergence"]


def command(page):
    options = ["--quick", "--seeds", "2", "--jobs", "2", "--json", "--out", str(page)]
    return [sys.executable, "-m", "keelnorm", "lab", "run", *CLAIMS, *options]


def sections(ended):
    """The claims without what no two runs have in common: how long the cells took."""
    document = json.loads(ended.stdout)
    assert document["run"]["missing"] == document["run"]["failed"] == 0
    return [{key: value for key, value in each.items() if key != "core_seconds"} for each in document["sections"]]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_page(tmp_path):
    whole = subprocess.run(command(tmp_path / "whole.html"), capture_output=True, text=True, check=True)
    draw = random.Random(0)
    page = tmp_path / "killed.html"
    kept = []
    for _ in range(4):
        process = subprocess.Popen(
            command(page), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(draw.uniform(3.0, 9.0))
        os.killpg(process.pid, signal.SIGKILL)  # with the workers: as if the machine had stopped
        process.wait()
        assert not page.exists() or page.read_text().rstrip().endswith("</html>")
        results = page.with_suffix(".jsonl")
        kept.append(results.read_bytes().count(b'"result"') if results.exists() else 0)
    assert kept == sorted(kept)  # nothing that was kept is lost
    ended = subprocess.run(command(page), capture_output=True, text=True, check=True)
    assert sections(ended) == sections(whole)
    reported = subprocess.run(
        [sys.executable, "-m", "keelnorm", "lab", "report", "--json", "--out", str(page)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sections(reported) == sections(whole)
