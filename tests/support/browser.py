"""A headless Chromium, driven by Playwright, that loads a page and records errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
EXECUTABLE = next((path for path in map(shutil.which, NAMES) if path), None)
"""A Chromium on this machine."""
MISSING = "no Chromium is installed on this machine"


class View:
    """One tab. Collects `problems` (console errors and warnings, exceptions) and `requests` (addresses asked for)."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda said: self.problems.extend([said.text] * (said.type in ("error", "warning"))))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, width: int = 1280, theme: Literal["light", "dark"] = "light") -> None:
        """Load a file at this width and theme, and wait until every plot is drawn."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=theme, media="screen")
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn=light], html[data-drawn=dark]", state="attached")

    def drawn(self, theme: Literal["light", "dark"]) -> None:
        """Wait until every plot is drawn in this theme: the page hears of a new one only with its next frame."""
        self.page.wait_for_selector(f"html[data-drawn={theme}]", state="attached")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.page.evaluate(expression)


@contextmanager
def opened() -> Iterator[View]:
    """A tab that is closed in the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=list(FLAGS))
        try:
            yield View(browser.new_page())
        finally:
            browser.close()
