"""report.html in a browser: nothing fails, nothing is fetched, and everybody can read it.

benchmarks/accessibility.py runs axe-core on a report; here are the assertions that need no other package.
"""

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import new_page
from mpvg.analysis.sensitivity import KINDS


@pytest.fixture(scope="module")
def opened(written: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of two methods, what it complained of, and what it fetched."""
    with new_page() as (page, complaints, fetched):
        page.on("console", lambda message: complaints.append(message.text))
        page.goto((written / "report.html").as_uri())
        page.wait_for_selector("#correlation .plot-container")
        yield page, complaints, fetched


@pytest.fixture
def page(opened: tuple[Any, list[str], list[str]]) -> Iterator[Any]:
    """The page; what a test emulates is undone."""
    yield opened[0]
    opened[0].emulate_media(color_scheme="light", media="screen")
    opened[0].set_viewport_size({"width": 1200, "height": 900})


def test_nothing_fails_and_nothing_is_fetched(opened: tuple[Any, list[str], list[str]]) -> None:
    page, complaints, fetched = opened
    assert complaints == []
    assert [url for url in fetched if not url.startswith("data:")] == [page.url.split("#")[0]]


def test_the_pictures_are_there(opened: tuple[Any, list[str], list[str]]) -> None:
    page, _, _ = opened
    sizes = page.eval_on_selector_all("figure img", "all => all.map(image => image.naturalWidth)")
    assert len(sizes) == 9 + 3  # three are shown in print only
    assert min(sizes) > 300
    assert page.locator("#correlation .scatterlayer .trace").count() == 4  # two methods, trained and untrained
    assert page.locator("#last .scatterlayer .trace").count() == 5  # gamma and beta, and MPVG's shifted beta
    assert page.title() == page.locator("h1").text_content() == "What position embeddings do"
    assert page.locator("#sentences h3").all_text_contents() == ["mpvg", "gap"]


def test_a_curve_tells_its_values(opened: tuple[Any, list[str], list[str]]) -> None:
    page, _, _ = opened
    page.locator("#correlation").scroll_into_view_if_needed()
    point = page.locator("#correlation .scatterlayer .trace .point").nth(1).bounding_box()
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
    canvas = page.locator("#norms canvas").nth(1)
    size = canvas.bounding_box()
    canvas.hover(position={"x": size["width"] * 0.9, "y": size["height"] * 0.1})
    norm = page.evaluate("norms.runs[0].maps[3].after[0][3]")
    assert page.locator("#value").text_content() == f"mpvg, after the Last LN, row 0, column 3: {norm}"


# ---- what comes first


def test_the_runs_come_first_then_what_r_is_then_r(page: Any) -> None:
    headings = page.locator("h2").all_text_contents()
    assert headings[:3] == ["The runs", "What r is, and what the paper says", "What was found"]
    tables = page.locator("table caption").all_text_contents()
    assert tables[0] == "Accuracy and NLL"
    rows = page.locator("table").first.locator("tbody th").all_text_contents()
    assert rows == ["mpvg", "gap"]
    assert "accuracy minus mpvg, points" in page.locator("table").first.locator("th").all_text_contents()
    assert "The paper" in page.locator("h2:has-text('What r is') ~ p").nth(1).text_content()


def cells_of(page: Any, caption: str) -> dict[str, list[str]]:
    """Row -> its cells, of a table."""
    rows = page.locator(f"table:has(caption:text-is('{caption}')) tbody tr").all()
    return {row.locator("th").text_content(): row.locator("td").all_text_contents() for row in rows}


def test_the_parts_of_r_stand_behind_r_with_their_shares(page: Any, written: Path) -> None:
    assert page.locator("h2").all_text_contents().index("What of r is the same at every position") == 4
    rows = cells_of(page, "The two parts of r")
    assert len(rows) == 2 * (2 * 2 + 4)  # two methods; r of two parts, before and after training, and four shares
    with (written / "layers.csv").open() as file:
        gap = [row for row in csv.DictReader(file) if row["group"] == "gap" and row["network"] == "trained"]
    for field in ("r_constant", "r_positional"):
        low, high = (float(gap[2][f"{field}_{end}"]) for end in ("low", "high"))
        assert low < float(gap[2][field]) < high
        digits = len(rows[f"gap: {field}"][2].split(" to ")[1].split(".")[1])
        assert rows[f"gap: {field}"][2].startswith(f"{float(gap[2][field]):+.{digits}f}{low:+.{digits}f} to ")
    share = rows["gap: constant share of the covariance, %"]
    for cell, row in zip(share, gap, strict=True):
        assert (cell == "-") == (float(row["r_low"]) <= 0 <= float(row["r_high"]))
        assert (row["covariance_constant_low"] == "") == (cell == "-")
    assert {len(cells) for cells in rows.values()} == {5}


def test_every_replacement_is_in_one_table_with_accuracy_and_nll(page: Any, written: Path) -> None:
    rows = cells_of(page, "Changes if one layer receives another PE")
    assert len(rows) == 2 * len(KINDS)  # accuracy and NLL; GAP has nothing to replace
    runs = json.loads((written / "results.json").read_text())["runs"]
    assert [one["beyond"]["importance"] == [] for one in runs] == [False, False, True]
    first, second = (one["beyond"]["importance"] for one in runs[:2])
    assert [place["name"] for place in first] == ["1", "2", "3", "Last LN"]
    assert [place["neighbor"] for place in first] == ["2", "3", "Last LN", "3"]
    for kind, words in KINDS.items():
        for score, label, scale in (("accuracy", "accuracy, points", 100), ("nll", "NLL", 1)):
            for number, cell in enumerate(rows[f"mpvg: {words}, {label}"]):
                mean = scale * (first[number][kind][score] + second[number][kind][score]) / 2
                printed = re.match(r"[+-]\d+\.\d+(e[+-]\d+)?", cell)
                assert printed
                assert float(printed[0]) == pytest.approx(mean, rel=0.05, abs=0.0051)
                assert ("PE of" in cell) == (kind == "swapped")


def test_captions_name_the_figures_of_the_paper_and_headings_do_not(written: Path) -> None:
    html = (written / "report.html").read_text()
    assert html.count("of the paper") >= 5
    headings = [text.split("</h")[0] for text in html.split("<h2>")[1:]]
    assert not any("Fig." in text for text in headings)


# ---- any width, any mode, paper


@pytest.mark.parametrize("width", [320, 400, 768, 1400])
def test_the_page_is_as_wide_as_the_screen(page: Any, width: int) -> None:
    """Wide tables scroll in their own box, which the keyboard reaches."""
    page.set_viewport_size({"width": width, "height": 900})
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    page.wait_for_function(f"document.querySelector('#correlation .main-svg').getBoundingClientRect().width <= {width}")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = page.eval_on_selector_all(
        "table", "all => all.filter(t => !t.parentElement.matches('.scroll[tabindex=\"0\"][aria-label]')).length"
    )
    assert outside == 0
    chart = page.locator("#correlation").bounding_box()
    assert chart["width"] >= min(width, 72 * 16) - 40
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = false)")


CONTRASTS = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const lum = text => rgb(text).slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) => {
    const [low, high] = [lum(a), lum(b)].sort((x, y) => x - y);
    return (high + .05) / (low + .05);
  };
  const back = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor, parts = rgb(color);
      if (parts.length < 4 || parts[3] > 0) return color;
    }
  };
  const texts = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest("script, canvas")
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const color = e => e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
  const lines = [...document.querySelectorAll(".scatterlayer .js-line")];
  return {
    back: getComputedStyle(document.body).backgroundColor,
    texts: texts.map(e => [ratio(color(e), back(e)), e.textContent.slice(0, 40)]),
    lines: lines.map(e => ratio(getComputedStyle(e).stroke, back(e))),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_have_the_contrast_of_level_aa(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(300)
    found = page.evaluate(CONTRASTS)
    assert (found["back"] == "rgb(255, 255, 255)") == (scheme == "light")
    assert len(found["texts"]) > 100
    assert [text for contrast, text in found["texts"] if contrast < 4.5] == []
    assert len(found["lines"]) == 4 + 5
    assert min(found["lines"]) >= 3
    cards = page.eval_on_selector_all("figure img", "all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert set(cards) == {"rgb(255, 255, 255)"}  # the pictures are drawn in black


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_shows_all_figures_on_white(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, media="print")
    page.set_viewport_size({"width": 680, "height": 960})  # A4 without margins, in CSS pixels
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#correlation, #last, #norms").first.is_visible()
    assert not page.locator("#norms").is_visible()
    figures = page.locator("figure")
    boxes = [figures.nth(number).locator("img").bounding_box() for number in range(figures.count())]
    assert len(boxes) == 12
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 680 and box["height"] < 960 for box in boxes)
    ids = page.eval_on_selector_all("figure", "all => all.map(one => one.id)")
    assert {"fig4", "fig6", "fig7"} <= set(ids)
    breaks = page.eval_on_selector_all("figure", "all => all.map(one => getComputedStyle(one).breakInside)")
    assert set(breaks) == {"avoid"}


def test_a_static_figure_is_shown_in_print_only(page: Any) -> None:
    assert not page.locator("#fig4").is_visible()
    assert page.locator("#correlation").is_visible()


# ---- keyboard and labels


def test_everything_has_a_label(page: Any) -> None:
    assert page.get_attribute("html", "lang") == "en"
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    for chart in page.locator("#correlation, #last, #norms canvas").all():
        assert chart.get_attribute("role") == "img"
        assert chart.get_attribute("tabindex") == "0"
        assert len(chart.get_attribute("aria-label")) > 30


def test_the_first_tab_skips_to_the_report(page: Any) -> None:
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Enter")
    assert outline == "solid"
    assert page.evaluate("document.activeElement.id") == "main"


def test_arrow_keys_read_a_chart(page: Any) -> None:
    page.locator("#correlation").focus()
    said = page.locator("#correlation + output")
    r = page.evaluate("charts.correlation.traces.map(trace => trace.y.map(format))")
    for key, curve, layer in (("ArrowRight", 0, 0), ("ArrowRight", 0, 1), ("ArrowDown", 1, 1), ("ArrowLeft", 1, 0)):
        page.keyboard.press(key)
        name = ["mpvg", "mpvg, untrained"][curve]
        assert said.text_content() == f"{name}, layer {layer}: {r[curve][layer]}"
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    assert said.text_content() == f"mpvg, untrained, layer Last LN: {r[1][4]}"


def test_arrow_keys_read_a_map(page: Any) -> None:
    page.locator("#thumbnails button").nth(2).click()
    canvas = page.locator("#norms canvas").first
    plain = canvas.evaluate("one => one.toDataURL()")
    canvas.focus()
    norms = page.evaluate("norms.runs[0].maps[2].before")
    for key, row, column in (("ArrowDown", 0, 0), ("ArrowDown", 1, 0), ("ArrowRight", 1, 1), ("ArrowUp", 0, 1)):
        page.keyboard.press(key)
        expected = f"mpvg, before the Last LN, row {row}, column {column}: {norms[row][column]}"
        assert page.locator("#value").text_content() == expected
    assert canvas.evaluate("one => one.toDataURL()") != plain  # the token is marked
    canvas.evaluate("one => one.blur()")
    assert canvas.evaluate("one => one.toDataURL()") == plain


def test_tables_hold_what_the_charts_and_maps_show(page: Any) -> None:
    tables = page.locator("details table")
    captions = tables.locator("caption").all_text_contents()
    assert captions[:2] == [page.evaluate(f"charts.{name}.label") for name in ("correlation", "last")]
    assert captions[2:] == [
        f"{run}: norms of the tokens {kind} the Last LN" for run in ("mpvg", "gap") for kind in ("before", "after")
    ]
    for number, name in enumerate(("correlation", "last")):
        shown = [
            row.all_text_contents() for row in (r.locator("td") for r in tables.nth(number).locator("tbody tr").all())
        ]
        values = page.evaluate(f"charts.{name}.traces.map(trace => trace.y.map(format))")
        assert shown == [list(row) for row in zip(*values, strict=True)]


# ---- scales and axes


def test_maps_have_a_scale_with_numbers(page: Any) -> None:
    page.locator("#thumbnails button").nth(4).click()
    for number, kind in enumerate(("before", "after")):
        norms = page.evaluate(f"norms.runs.flatMap(run => run.maps[4].{kind}.flat())")
        low, middle, high = (
            float(text) for text in page.locator(".scale").nth(number).locator("span").all_text_contents()[1:]
        )
        assert (low, high) == (min(norms), max(norms))
        assert middle == pytest.approx((low + high) / 2, rel=1e-3)


def test_the_axis_of_r_includes_0_and_is_not_a_magnifying_glass(page: Any) -> None:
    low, high = page.evaluate("document.getElementById('correlation').layout.yaxis.range")
    assert low < 0 < high
    assert high - low >= 0.4
