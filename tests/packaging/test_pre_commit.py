"""What pre-commit runs is what `make check` runs."""

from __future__ import annotations

import re

from source_tree import ROOT


def test_pre_commit_runs_the_checks() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [checks] = re.findall(r"^CHECKS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"entry: make ([\w-]+)", hooks) == checks.split()
    assert re.findall(r"^ *- repo: (.+)$", hooks, re.MULTILINE) == ["local"]  # nothing to download
    assert hooks.count("language: system") == len(checks.split())
