"""docs/rules.md is what the rules say, and troubleshooting names each rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keelnorm.doctor import rules_page
from keelnorm.doctor.known_rules import own_rules

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_from_the_rules():
    assert (DOCS / "rules.md").read_text(encoding="utf-8") == rules_page.page(own_rules().values()), "run make rules"


def test_it_is_written(tmp_path, capsys):
    rules_page.main([str(tmp_path / "rules.md")])
    assert (tmp_path / "rules.md").read_text(encoding="utf-8").startswith("# Rules of the doctor\n")
    assert capsys.readouterr().out == f"{tmp_path / 'rules.md'}\n"
    with pytest.raises(SystemExit, match=r"docs/rules\.md"):
        rules_page.main([])


def test_troubleshooting_leads_to_every_rule():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\[(KN\d+)\]\(rules\.md#(?:kn\d+-[a-z-]+)\)", text))
    assert linked == set(own_rules())
