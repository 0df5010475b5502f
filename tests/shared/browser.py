"""The machine's Chromium, for the tests of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def new_page(width: int = 1200) -> Iterator[tuple[Any, list[str], list[str]]]:
    """An empty page, the errors of its scripts, and the addresses that it asks for."""
    assert CHROMIUM, "these tests need a browser; on Debian: apt-get install chromium"
    complaints: list[str] = []
    requested: list[str] = []
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        yield page, complaints, requested
        browser.close()
