"""Figures in prose are those of the records: a comment after a figure names the file and the way to the number in it.

    1.86 (1.79 to 1.98)<!-- benchmarks/records/processes.json > two / one -->
    75.62<!-- results/demo-fashion-mnist.jsonl > [method=pvg, epochs=1] > accuracy > mean > x100 -->

A step is a key, a position from 0, or [key=value, ...], the entries that have these values. `mean` and `spread`, which
is largest less smallest, make one number of several, x100 turns a share into percent or points, and " minus "
subtracts the number at another way in the same file. A figure with its interval is three numbers: low, middle, high.
"""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    *("README.md", "docs/results.md", "docs/cost.md", "docs/scale.md"),
    *("docs/input.md", "docs/analysis.md", "docs/scenes.md", "docs/dense.md", "docs/trained.md", "docs/predict.md"),
)
"""Where figures stand that were measured."""
NUMBER = r"[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?"
MARKED = re.compile(rf"({NUMBER}(?: \({NUMBER} to {NUMBER}\))?)(?: (?:%|points|s|MB|times))?<!-- ([^>]* > .*?) -->")
GIVEN = {
    *("0.02", "3.11", "2.15", "1.9", "2.0", "0.28"),  # a PE's std, versions, a licence, one image of 360
    *("0.1", "0.01", "0.001"),  # DINOv2's offset, penalties of a probe
    *("1706.04599", "0.43"),  # a number of arXiv, the run that docs/predict.md shows
    *("1.03", "1.6", "1.031", "2.1", "0.4", "0.5", "0.6", "0.11"),  # limits, WCAG's version, axes, sizes
}
"""Decimal figures of the pages that nobody measured."""
COMPUTED = {
    *("+0.06", "+0.04", "+0.08", "+0.07"),
    *("-0.018", "-0.051", "+0.014", "-0.015", "-0.031", "+0.000"),
}
"""Intervals in docs/analysis.md, which tests/test_readme.py computes from the values of every seed."""


def prose(page: str) -> str:
    """A page on one line, without its tables, code, links and generated parts."""
    text = re.sub(r"<!-- results -->.*?<!-- /results -->|```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", " ".join(" ".join(lines).split()))


FIGURES = [(page, *found) for page in PAGES for found in MARKED.findall(prose(page))]


def values_at(marker: str) -> list[float]:
    file, *ways = re.split(r" > (?=\S)", marker, maxsplit=1)
    text = (ROOT / file).read_text()
    content = list(map(json.loads, text.splitlines())) if file.endswith(".jsonl") else json.loads(text)
    first, *others = [follow(content, way.split(" > ")) for way in ways[0].split(" minus ")]
    return [first[0] - sum(other[0] for other in others)] if others else first


def follow(content: Any, steps: list[str]) -> list[float]:
    scale = 1
    for step in steps:
        if step == "x100":
            scale = 100
        elif step == "mean":
            content = mean(content)
        elif step == "spread":
            content = max(content) - min(content)
        elif step.startswith("["):
            wanted = dict(part.split("=") for part in step[1:-1].split(", "))
            content = [entry for entry in content if all(str(entry[key]) == value for key, value in wanted.items())]
            assert content, f"nothing has {wanted}"
            content = content[0] if len(content) == 1 else content
        elif isinstance(content, list):
            content = content[int(step)] if step.isdecimal() else [entry[step] for entry in content]
        else:
            content = content[step]
    if isinstance(content, dict):
        content = [content["low"], content["median"], content["high"]]
    return [scale * value for value in (content if isinstance(content, list) else [content])]


@pytest.mark.parametrize(("page", "shown", "marker"), FIGURES, ids=[f"{page}:{shown}" for page, shown, _ in FIGURES])
def test_a_marked_figure_is_that_of_its_record(page: str, shown: str, marker: str) -> None:
    numbers = re.findall(NUMBER, shown)
    values = values_at(marker)
    assert len(values) == len(numbers), marker
    for number, value in zip(numbers, values if len(values) == 1 else (values[1], values[0], values[2]), strict=True):
        digits, sign = len(number.partition(".")[2]), "+" if number.startswith("+") else ""
        assert number == f"{value:{sign},.{digits}f}" or number == f"{value:{sign}.{digits}f}", f"{shown}: {marker}"


@pytest.mark.parametrize("page", PAGES)
def test_a_measured_figure_has_a_marker(page: str) -> None:
    """Decimal figures in prose; those of tables are compared with the records in tests/test_readme.py."""
    unmarked = re.findall(r"(?<![\w.])[-+]?\d+\.\d+(?![\w.]|-\w)", MARKED.sub("", prose(page)))
    assert [figure for figure in unmarked if figure not in GIVEN | COMPUTED] == []


def test_there_are_marked_figures() -> None:
    assert len(FIGURES) >= 20
    assert {page for page, *_ in FIGURES} >= {"README.md", "docs/results.md", "docs/cost.md", "docs/analysis.md"}
