"""report.html in a browser: nothing fails, nothing is fetched, the pictures are there, the picker works."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def opened(written: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of two methods, what it complained of, and what it fetched."""
    assert CHROMIUM, "these tests need a browser; on Debian: apt-get install chromium"
    complaints: list[str] = []
    fetched: list[str] = []
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto((written / "report.html").as_uri())
        page.wait_for_selector("#correlation .plot-container")
        yield page, complaints, fetched
        browser.close()


def test_nothing_fails_and_nothing_is_fetched(opened: tuple[Any, list[str], list[str]]) -> None:
    page, complaints, fetched = opened
    assert complaints == []
    assert [url for url in fetched if not url.startswith("data:")] == [page.url]


def test_the_pictures_are_there(opened: tuple[Any, list[str], list[str]]) -> None:
    page, _, _ = opened
    sizes = page.eval_on_selector_all("figure img", "all => all.map(image => image.naturalWidth)")
    assert len(sizes) == 8
    assert min(sizes) > 300
    assert page.locator("#correlation .scatterlayer .trace").count() == 4  # two methods, trained and untrained
    assert page.locator("#last .scatterlayer .trace").count() == 5  # gamma and beta, and MPVG's shifted beta
    assert page.title() == page.locator("h1").text_content() == "What position embeddings do"
    assert page.locator("#sentences h3").all_text_contents() == ["mpvg", "gap"]


def test_a_curve_tells_its_values(opened: tuple[Any, list[str], list[str]]) -> None:
    page, _, _ = opened
    page.locator("#correlation").scroll_into_view_if_needed()
    point = page.locator("#correlation .scatterlayer .trace .point").first.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_selector("#correlation .hoverlayer .hovertext")
    assert "mpvg" in page.locator("#correlation .hoverlayer").text_content()


def test_the_picker_shows_another_image(opened: tuple[Any, list[str], list[str]]) -> None:
    page, complaints, _ = opened
    buttons = page.locator("#thumbnails button")
    assert buttons.count() == 12

    def drawn(number: int) -> list[str]:
        buttons.nth(number).click()
        page.wait_for_timeout(200)  # the pictures are decoded in their own time
        assert page.locator("#thumbnails button[aria-pressed=true]").count() == 1
        assert buttons.nth(number).get_attribute("aria-pressed") == "true"
        found: list[str] = page.eval_on_selector_all("#norms canvas", "all => all.map(c => c.toDataURL())")
        return found

    first, second = drawn(0), drawn(5)
    assert len(first) == len(second) == 4  # two methods, before and after
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert drawn(0) == first
    assert complaints == []


def test_the_pointer_tells_the_norm_of_a_token(opened: tuple[Any, list[str], list[str]]) -> None:
    page, _, _ = opened
    page.locator("#thumbnails button").nth(3).click()
    page.locator("#norms canvas").nth(1).hover(position={"x": 200, "y": 30})
    norm = page.evaluate("norms.runs[0].maps[3].after[0][3]")
    assert page.locator("#value").text_content() == f"mpvg, after the Last LN, row 0, column 3: {norm}"
