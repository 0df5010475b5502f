"""The demo: its arms are those of its committed records, and it ends with a page that needs nothing else."""

import functools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mpvg import runs
from mpvg.analysis import report
from mpvg.study import demo
from mpvg.study.demo import STUDIES, Trained, what_shrinks
from mpvg.study.folder import make_folder
from mpvg.study.ledger import append_row
from mpvg.study.plan import make_cells, read_study
from mpvg.study.runner import run_cell
from mpvg.training import train
from study_text import row_values, write_ledger

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("data", STUDIES)
def test_both_demos_have_the_arms_that_the_sentence_compares(data: str) -> None:
    study = read_study(STUDIES[data])
    (scale,) = study.scales
    cells = make_cells(study, scale, Path("out"))
    assert {cell.config.data for cell in cells} == {data}
    found = {cell.arm: cell.config for cell in cells}
    assert list(found) == ["gap", "gap_std1", "pvg", "mpvg", "gap_long", "mpvg_long"]
    for name in ("gap", "mpvg"):
        short, long = found[name].to_dict(), found[f"{name}_long"].to_dict()
        assert {field for field in short if short[field] != long[field]} == {"epochs", "out"}, "no longer warm-up"
        assert long["epochs"] == 4 * short["epochs"]


def summaries(*accuracies: float) -> list[dict[str, Any]]:
    more = {"nll": 1.5, "parameters": 12345, "images_per_second": 99.6, "epochs": 2}
    return [{"accuracy": accuracy} | more for accuracy in accuracies]


@pytest.mark.parametrize(
    ("long", "verdict"),
    [
        (0.93, "MPVG - GAP is +4.00 points at 2 epochs and shrinks to +1.00 at 8;"),
        (0.91, "MPVG - GAP is +4.00 points at 2 epochs and shrinks to -1.00 at 8;"),
        (0.98, "MPVG - GAP is +4.00 points at 2 epochs and does not shrink: +6.00 at 8;"),
        (0.88, "MPVG - GAP is +4.00 points at 2 epochs and does not shrink: -4.00 at 8;"),
    ],
)
def test_the_sentence_says_what_shrinks(long: float, verdict: str) -> None:
    values = {"mpvg_long": (long - 0.01, long + 0.01), "gap_long": (0.91, 0.93), "mpvg": (0.84, 0.86)}
    values |= {"pvg": (0.83, 0.84), "gap_std1": (0.81, 0.82), "gap": (0.80, 0.82)}  # in any order: arms have names
    results = {name: Trained(name, summaries(*pair), []) for name, pair in values.items()}
    results["gap_long"].summaries[0]["epochs"] = 8
    sentence = what_shrinks(results)
    assert sentence.startswith(verdict)
    assert "starting GAP's PE at std 1 alone makes +0.50, and PVG +2.50 (means of 2 seeds:" in sentence


def test_a_row_has_the_mean_and_each_seed() -> None:
    (row,) = demo.table_rows({"mpvg": Trained("MPVG", summaries(0.5, 0.75), [])})
    assert row == ["MPVG", "2", "62.50", "50.00 75.00", "1.5000", "12,345", "100"]


class Page(HTMLParser):
    """What a page fetches, and its rows and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.count: dict[str, int] = {}
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [f"{name}={value}" for name, value in attrs if name.split(":")[-1] in ("src", "href", "srcset")]
        self.in_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1].append(data)


MINI = """
study: mini_demo
question: Does the demo run?
reference: gap
margins: {nll: 0.02}
arms:
  gap: {label: GAP, set: {method: gap}}
  gap_std1: {label: "GAP, PE std 1", set: {method: gap, network.pos_std: 1.0}}
  pvg: {label: PVG, set: {method: pvg}}
  mpvg: {label: MPVG, set: {method: mpvg}}
  gap_long: {set: {method: gap, epochs: 2}}
  mpvg_long: {set: {method: mpvg, epochs: 2}}
contrasts: {}
scales:
  tiny:
    digits: {recipe: digits, set: {epochs: 1, batch_size: 256, optim.warmup_epochs: 0}, seeds: 1}
"""


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A demo of eight epochs in all, whose report looks at few images."""
    monkeypatch.setattr(report, "Options", functools.partial(report.Options, images=40))
    file = tmp_path / "mini_demo.yaml"
    file.write_text(MINI)
    monkeypatch.setitem(demo.STUDIES, "digits", str(file))
    return str(file)


def test_the_demo_continues_what_was_begun_and_ends_with_a_page_that_needs_nothing_else(
    tmp_path: Path, mini: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    folder = make_folder(out, read_study(mini), "tiny")
    recorded, complete = folder.cells()[:2]
    append_row(folder.ledger, run_cell(folder, recorded))
    train(complete.config, quiet=True)
    kept = [Path(cell.config.out) / "summary.json" for cell in (recorded, complete)]
    written = [file.stat().st_mtime_ns for file in kept]

    demo.demo("digits", out)

    printed = capsys.readouterr().out
    assert "5 of 6 runs are missing" in printed
    assert all(text in printed for text in (f"report: {out / 'report.html'}", "6/6 done"))
    assert [file.stat().st_mtime_ns for file in kept] == written
    found = [runs.load(cell.config.out).summary() for cell in folder.cells()]

    page = Page((out / "report.html").read_text())
    assert all(link.split("=", 1)[1].startswith(("#", "data:")) for link in page.fetched), page.fetched
    assert page.count["table"] == 3  # the runs, r at every layer, and its parts; no second table of the runs
    head, *rows = page.rows[:7]
    assert head[:6] == ["runs", "seeds", "images", "accuracy, %", "each seed, %", "NLL"]
    shown = ["gap, 1", "gap, PE std 1, 1", "pvg, 1", "mpvg, 1", "gap, 2", "mpvg, 2"]
    assert [row[0] for row in rows] == [f"{name} epochs" for name in shown]
    for row, given in zip(rows, found, strict=True):
        summary: Any = given
        assert row[4] == f"{100 * summary['accuracy']:.2f}"
        assert float(row[3]) == pytest.approx(100 * summary["accuracy"], rel=0.005)
        assert float(row[5]) == pytest.approx(summary["nll"], rel=0.005)
    assert (out / "curves.svg").read_text().count("<svg") == 1
    for name in ("curves", "figures/fig4", "figures/fig7"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    places = json.loads((out / "results.json").read_text())["runs"]
    assert [Path(one["run"]) for one in places] == [Path(cell.config.out) for cell in folder.cells()]


def test_a_demo_with_a_run_that_diverged_says_which(tmp_path: Path, mini: str) -> None:
    folder = make_folder(tmp_path / "out", read_study(mini), "tiny")
    rows = [
        row_values(cell.arm, 0, study="mini_demo", digest=cell.config.digest(), status="diverged", metrics={})
        for cell in folder.cells()
    ]
    write_ledger(folder.ledger, rows)
    with pytest.raises(ValueError, match="no result for runs/digits/gap/seed0: it diverged, or another command"):
        demo.demo("digits", folder.path)
