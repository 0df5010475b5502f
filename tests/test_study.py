"""Runs side by side, in real processes, and the page about them."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mpvg import figures, runs, study
from mpvg.cli import main
from mpvg.config import NetworkConfig, RunConfig
from mpvg.recipes import recipe
from mpvg.study import Arm
from mpvg.training import loop, train

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


ARMS = [
    Arm("GAP", "gap", None, 2),
    Arm("GAP, PE started at std 1", "gap", 1.0, 2),
    Arm("PVG", "pvg", None, 2),
    Arm("MPVG", "mpvg", None, 2),
    Arm("GAP, longer", "gap", None, 8),
    Arm("MPVG, longer", "mpvg", None, 8),
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
    values = [(0.80, 0.82), (0.81, 0.82), (0.83, 0.84), (0.84, 0.86), (0.91, 0.93), (long - 0.01, long + 0.01)]
    results = {arm: summaries(*pair) for arm, pair in zip(ARMS, values, strict=True)}
    sentence = study._what_shrinks(results, ARMS)
    assert sentence.startswith(verdict)
    assert "starting GAP's PE at std 1 alone makes +0.50, and PVG +2.50 (means of 2 seeds:" in sentence


def test_a_row_has_the_mean_and_each_seed() -> None:
    (row,) = study._rows({ARMS[3]: summaries(0.5, 0.75)})
    assert row == ["MPVG", "2", "62.50", "50.00 75.00", "1.5000", "12,345", "100"]


def test_another_run_in_a_folder_of_the_plan_is_refused(tmp_path: Path) -> None:
    config = replace(BASE, out=str(tmp_path / "run"), threads=1, device="cpu", batch_size=1400)
    train(config, quiet=True)
    with pytest.raises(ValueError, match="run holds another run than this plan's; remove it, or give another --out"):
        study.run_all([replace(config, seed=1)])


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
    monkeypatch.setitem(study.DEMOS, "digits", BASE)
    monkeypatch.setattr(study, "LONGER", 2)
    monkeypatch.setattr(study, "SEEDS", (0,))
    out = tmp_path / "demo"
    complete = Arm("", "gap", None, 1).run(BASE, 0, out)
    train(complete, quiet=True)
    written = (Path(complete.out) / "summary.json").stat().st_mtime_ns
    interrupted: RunConfig = Arm("", "mpvg", None, 2).run(BASE, 0, out)
    evaluate = loop.Trainer._evaluate

    def evaluate_once(self: Any) -> Any:
        if self.position.epoch == 1:
            raise KeyboardInterrupt
        return evaluate(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "_evaluate", evaluate_once)
        train(interrupted, quiet=True)

    study.demo("digits", out)

    printed = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in printed
    assert "6/6 done" in printed
    folders = ["gap-1ep-seed0", "gap-2ep-seed0", "gap-posstd1-1ep-seed0", "mpvg-1ep-seed0", "mpvg-2ep-seed0"]
    folders.append("pvg-1ep-seed0")
    assert sorted(file.name for file in out.iterdir() if file.is_dir()) == ["figures", *folders]
    found = {name: runs.load(out / name).summary() for name in folders}
    assert (Path(complete.out) / "summary.json").stat().st_mtime_ns == written
    assert [line["epoch"] for line in runs.load(interrupted.out).metrics()] == [1, 2]

    page = Page((out / "report.html").read_text())
    assert all(link.split("=", 1)[1].startswith(("#", "data:")) for link in page.fetched), page.fetched
    assert page.count["table"] == 2  # the comparison, and r at every layer
    head, *rows = page.rows[:7]
    assert head == list(study._COLUMNS[1:])  # the first is empty
    assert [row[0].split(",")[0] for row in rows] == ["GAP", "GAP", "PVG", "MPVG", "GAP", "MPVG"]
    assert [row[1] for row in rows] == ["1", "1", "1", "1", "2", "2"]
    order = ["gap-1ep-seed0", "gap-posstd1-1ep-seed0", "pvg-1ep-seed0", "mpvg-1ep-seed0", "gap-2ep-seed0"]
    for row, name in zip(rows, [*order, "mpvg-2ep-seed0"], strict=True):
        summary: Any = found[name]
        assert row[2] == row[3] == f"{100 * summary['accuracy']:.2f}"
        assert row[4] == f"{summary['nll']:.4f}"
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
    figures.plt.close(drawn)


def test_the_summaries_are_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(summaries(0.5))) == summaries(0.5)


# ---- run folders, listed and drawn


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one run, one of another method that has not come to its end, and one that is damaged."""
    root = tmp_path_factory.mktemp("runs")
    for name, method, seed in (("a", "mpvg", 0), ("b", "mpvg", 1), ("deep/c", "gap", 0), ("d", "pvg", 0)):
        train(replace(BASE, out=str(root / name), method=method, seed=seed, threads=1, device="cpu"), quiet=True)
    (root / "deep/c/summary.json").unlink()
    (root / "d/config.yaml").write_text("method: [")
    return root


def test_run_folders_are_listed_with_their_state(some_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {state.path.name: state for state in study.find_runs(some_runs)}
    assert {name: state.state.split(":")[0] for name, state in states.items()} == {
        **{"a": "complete", "b": "complete"},
        **{"c": "unfinished", "d": "damaged"},
    }
    best = f"{100 * states['a'].metrics[0]['accuracy']:.2f}"
    assert states["a"].row() == (str(some_runs / "a"), "complete", "1/1", best, "digits", BASE.model, "mpvg", "0")
    assert states["d"].row()[2:] == ("-",) * 6
    assert main(["runs", str(some_runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["run", "state", "epochs", "best,", "%", "data", "model", "method", "seed"]
    assert len(printed) == 5
    assert main(["runs", str(some_runs / "a")]) == 0
    assert "complete" in capsys.readouterr().out


def test_seeds_of_a_run_are_one_curve(some_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    original = figures.lines

    def recording(curves: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.update(curves)
        return original(curves, *args, **kwargs)

    monkeypatch.setattr(figures, "lines", recording)
    study.plot_runs([some_runs], "nll", some_runs / "curves.png")
    expected = [[runs.load(some_runs / name).metrics()[0]["nll"]] for name in "ab"]
    assert [values for name, values in drawn.items() if " mpvg " in name] == [expected]
    assert len(drawn) == 2
    assert (some_runs / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "nowhere"], "no run in nowhere; give a folder that `mpvg train` made"),
        (["plot", "{}", "--key", "acuracy"], "no run has 'acuracy' yet; allowed: accuracy, "),
        (["plot", "{}", "--out", "{}/x.xyz"], "Format 'xyz' is not supported"),
        (["plot", "{}/d"], "no run has 'accuracy' yet; allowed: nothing, before an epoch ends"),
    ],
)
def test_what_cannot_be_listed_or_drawn_is_refused(
    arguments: list[str], message: str, some_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(some_runs) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
