"""The documentation site: built without a warning, complete, and read and searched without a request to anybody."""

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
from sphinx.cmd.build import main as sphinx_build

import mpvg.training  # noqa: F401  a process that is forked from this one need not import torch again
from browser import new_page

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    (command,) = re.findall(
        r"^\t\$\(VENV\)/bin/python (-m sphinx .*) build/docs$", (ROOT / "Makefile").read_text(), re.M
    )
    out = tmp_path_factory.mktemp("site")
    arguments = command.removeprefix("-m sphinx ").replace("build/doctrees", str(out / "doctrees")).split()
    assert {"-W", "--keep-going"} <= set(arguments)
    # Forked from this process, which has imported torch; and a process, as Sphinx changes the one that it runs in.
    with Pool(1, initializer=os.chdir, initargs=(ROOT,), context=get_context("fork")) as pool:
        code, said = pool.apply(build, ([*arguments, str(out / "html")],))
    assert code == 0, said
    return out / "html"


def build(arguments: list[str]) -> tuple[int, str]:
    """Sphinx's exit code and all it prints."""
    said = StringIO()
    with warnings.catch_warnings(action="ignore"), redirect_stdout(said), redirect_stderr(said):  # of Sphinx's own code
        code = sphinx_build(arguments)
    return code, said.getvalue()


class Elements(HTMLParser):
    """The addresses that a browser fetches by itself when it shows a page, and those that a reader can follow."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.followed: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src", "srcset", "data", "poster") and value:
                (self.followed if tag == "a" else self.fetched).append(value)


def test_every_page_is_there_and_every_link_inside_leads_somewhere(site: Path) -> None:
    pages = {path.relative_to(site): Elements(path.read_text()) for path in site.rglob("*.html")}
    for source in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        assert source.relative_to(ROOT).with_suffix(".html") in pages
    for name, page in pages.items():
        for address in [*page.fetched, *page.followed]:
            target, _, anchor = re.sub(r"\?.*", "", address).partition("#")
            if re.match(r"https?://|mailto:", target):
                assert address not in page.fetched, f"{name} fetches {address}"
                continue
            file = (site / name.parent / target).resolve() if target else site / name
            assert file.is_file(), f"{name} links {address}"
            if anchor and file.suffix == ".html":
                assert anchor in pages[file.relative_to(site.resolve())].ids, f"{name} links {address}"


def test_no_style_fetches_anything(site: Path) -> None:
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet.name


def test_the_code_of_tutorials_is_on_their_pages(site: Path) -> None:
    for name in ("first_run", "compare_methods", "fine_tune_timm"):
        shown = re.sub(r"<[^>]+>", "", (site / f"docs/tutorials/{name}.html").read_text())
        assert "if __name__ ==" in shown, name


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import mpvg

    ids = Elements((site / "docs/api.html").read_text()).ids
    assert {f"mpvg.{name}" for name in mpvg.__all__} <= ids
    assert {"mpvg.data.open_data", "mpvg.tasks.Task", "mpvg.inference.load_export"} <= ids


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site behind a server that only hands out files: Chromium refuses some scripts in files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def was_refused(request: Any) -> bool:
    """Whether the server or the network refused a request; the browser ends those of a page that is left by itself."""
    return bool(request.failure != "net::ERR_ABORTED")


def test_a_reader_asks_nobody_else_and_finds_what_she_searches(address: str) -> None:
    with new_page(1300) as (page, complaints, requested):
        page.on("requestfailed", lambda request: complaints.append(request.url) if was_refused(request) else None)
        page.goto(address)
        page.wait_for_url("**/docs/index.html")  # the first page leads to the list of pages
        page.get_by_role("searchbox").or_(page.locator("input[name=q]")).first.fill("PositionDelivery")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a")
        assert "docs/api.html" in "".join(
            link.get_attribute("href") or "" for link in page.locator("#search-results li a").all()
        )
        for name in ("README", "docs/api", "docs/method", "docs/claims", "docs/tutorials/first_run"):
            page.goto(f"{address}/{name}.html")
            for width in (1300, 400):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    assert complaints == []
    assert [url for url in requested if not url.startswith((f"{address}/", "data:"))] == []
