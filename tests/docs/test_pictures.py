"""Pictures of the pages: they show what their sources say, and can be read."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from pages import ROOT

PICTURES = sorted((ROOT / "docs/images").glob("*.svg"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_drawn_for_light_and_dark_pages(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert ET.fromstring(text).get("viewBox")
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_speed_is_that_of_the_figures() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/speed_picture.py"))
    assert len(script["rows"]()) == 6
    assert script["drawn"]() == (ROOT / "docs/images/speed.svg").read_text(encoding="utf-8")
