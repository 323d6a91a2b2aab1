"""docs/README.md lists every page once, under one of the four kinds."""

from __future__ import annotations

import re

from pages import PAGES, ROOT

INDEX = ROOT / "docs/README.md"
KINDS = ["Tutorials", "How-to guides", "Reference", "Explanation"]
#: Pages that another page lists.
LISTED_BY = {
    "docs/claims": ROOT / "docs/claims/README.md",
    "docs/claims_on_more_data": ROOT / "docs/claims_on_more_data/README.md",
}


def test_the_kinds_are_the_four() -> None:
    assert re.findall(r"^## (.+)$", INDEX.read_text(encoding="utf-8"), re.MULTILINE) == KINDS


def test_every_page_is_listed_once_and_with_a_line() -> None:
    lines = re.findall(r"^- \[[^]]+\]\(([^)]+)\)(.*)$", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    listed = [(INDEX.parent / path).resolve() for path, _ in lines]
    assert len(listed) == len(set(listed))
    assert not [path for path, line in lines if not line.startswith(": ")]
    missing = [
        page.relative_to(ROOT).as_posix()
        for page in PAGES
        if page != INDEX and page not in listed and page.parent.relative_to(ROOT).as_posix() not in LISTED_BY
    ]
    assert not missing, "docs/README.md does not list these pages"


def test_what_another_page_lists_is_there() -> None:
    for folder, index in LISTED_BY.items():
        links = set(re.findall(r"\]\((\w+\.md)\)", index.read_text(encoding="utf-8")))
        assert {page.name for page in (ROOT / folder).glob("*.md")} <= links | {"README.md"}
