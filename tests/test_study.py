"""Runs side by side, in real processes, and the page about them."""

import itertools
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mpvg import figures, runs
from mpvg.config import NetworkConfig, RunConfig
from mpvg.recipes import recipe
from mpvg.study import demo, pool
from mpvg.study.demo import Arm, Trained, make_arms, what_shrinks
from mpvg.tasks.classification import ClassificationTask
from mpvg.training import train

BASE = replace(
    recipe(None, "digits"),
    epochs=1,
    batch_size=256,
    optim=replace(recipe(None, "digits").optim, warmup_epochs=0),
)


def test_an_arm_changes_what_it_compares_and_how_it_is_run() -> None:
    base = replace(BASE, network=NetworkConfig(drop_path=0.1))
    config = Arm("started", "gap", 1.0, 7).run(base, 3, Path("out"))
    assert config == replace(
        base,
        method="gap",
        epochs=7,
        seed=3,
        threads=1,
        device="cpu",
        out="out/gap-posstd1-7ep-seed3",
        network=NetworkConfig(drop_path=0.1, pos_std=1.0),
    )
    assert Arm("plain", "mpvg", None, 7).run(base, 3, Path("out")).out == "out/mpvg-7ep-seed3"


def summaries(*accuracies: float) -> list[dict[str, Any]]:
    return [
        {"accuracy": accuracy, "nll": 1.5, "parameters": 12345, "images_per_second": 99.6} for accuracy in accuracies
    ]


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
    arms = make_arms(2)
    sentence = what_shrinks({name: Trained(arms[name], summaries(*pair), []) for name, pair in values.items()})
    assert sentence.startswith(verdict)
    assert "starting GAP's PE at std 1 alone makes +0.50, and PVG +2.50 (means of 2 seeds:" in sentence


def test_a_row_has_the_mean_and_each_seed() -> None:
    (row,) = demo.table_rows({"mpvg": Trained(make_arms(2)["mpvg"], summaries(0.5, 0.75), [])})
    assert row == ["MPVG", "2", "62.50", "50.00 75.00", "1.5000", "12,345", "100"]


def test_another_run_in_a_folder_of_the_plan_is_refused(tmp_path: Path) -> None:
    config = replace(BASE, out=str(tmp_path / "run"), threads=1, device="cpu", batch_size=1400)
    train(config, quiet=True)
    with pytest.raises(ValueError, match="run holds a run with another config than this plan's; remove it, or give"):
        pool.run_all([replace(config, seed=1)])


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


def test_the_demo_continues_what_was_begun_and_ends_with_a_page_that_needs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(demo.DEMOS, "digits", BASE)
    monkeypatch.setattr(demo, "LONGER", 2)
    monkeypatch.setattr(demo, "SEEDS", (0,))
    out = tmp_path / "demo"
    complete = Arm("", "gap", None, 1).run(BASE, 0, out)
    train(complete, quiet=True)
    written = (Path(complete.out) / "summary.json").stat().st_mtime_ns
    interrupted: RunConfig = Arm("", "mpvg", None, 2).run(BASE, 0, out)
    evaluate, calls = ClassificationTask.evaluate, itertools.count()

    def evaluate_once(self: ClassificationTask, *arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClassificationTask, "evaluate", evaluate_once)
        train(interrupted, quiet=True)

    demo.demo("digits", out)

    printed = capsys.readouterr().out
    assert all(text in printed for text in (f"report: {out / 'report.html'}", "6/6 done"))
    names = ["gap-1ep", "gap-2ep", "gap-posstd1-1ep", "mpvg-1ep", "mpvg-2ep", "pvg-1ep"]
    folders = [f"{name}-seed0" for name in names]
    assert sorted(file.name for file in out.iterdir() if file.is_dir()) == ["figures", *folders]
    found = {name: runs.load(out / name).summary() for name in folders}
    assert (Path(complete.out) / "summary.json").stat().st_mtime_ns == written
    assert [line["epoch"] for line in runs.load(interrupted.out).metrics()] == [1, 2]

    page = Page((out / "report.html").read_text())
    assert all(link.split("=", 1)[1].startswith(("#", "data:")) for link in page.fetched), page.fetched
    assert page.count["table"] == 2  # the runs, and r at every layer; the demo has no second table of the runs
    head, *rows = page.rows[:7]
    assert head[:6] == ["runs", "seeds", "images", "accuracy, %", "each seed, %", "NLL"]
    shown = ["gap, 1", "gap, PE std 1, 1", "pvg, 1", "mpvg, 1", "gap, 2", "mpvg, 2"]
    assert [row[0] for row in rows] == [f"{name} epochs" for name in shown]
    order = ["gap-1ep-seed0", "gap-posstd1-1ep-seed0", "pvg-1ep-seed0", "mpvg-1ep-seed0", "gap-2ep-seed0"]
    for row, name in zip(rows, [*order, "mpvg-2ep-seed0"], strict=True):
        summary: Any = found[name]
        assert row[4] == f"{100 * summary['accuracy']:.2f}"
        assert float(row[3]) == pytest.approx(100 * summary["accuracy"], rel=0.005)
        assert float(row[5]) == pytest.approx(summary["nll"], rel=0.005)
    assert (out / "curves.svg").read_text().count("<svg") == 1
    for name in ("curves", "figures/fig4", "figures/fig7"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    places = json.loads((out / "results.json").read_text())["runs"]
    assert [Path(one["run"]).name for one in places] == [*order, "mpvg-2ep-seed0"]


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        drawn = figures.lines({"x": [[1, 2, 3], [2, 3, 5]], "y": [[0, 1, 0]]}, "title", "epoch", "accuracy", first=1)
        figures.save(drawn, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{word}<" in text for word in ("title", "epoch", "accuracy", "x", "y"))


def test_repetitions_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        figures.lines({"x": [[1, 2, 3], [2, 3]]}, "title", "epoch", "accuracy")


def test_a_line_shows_the_mean_and_the_range() -> None:
    drawn = figures.lines({"x": [[1, 2], [3, 6]]}, "t", "x", "y", first=1)
    axes = drawn.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [2, 4]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(1, 1), (2, 2), (2, 6), (1, 3)}


def test_the_summaries_are_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(summaries(0.5))) == summaries(0.5)
