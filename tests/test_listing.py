"""`mpvg runs` and `mpvg plot`: run folders listed and drawn."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mpvg import figures, runs
from mpvg.cli.main import main
from mpvg.config import RunConfig
from mpvg.delivery import METHODS, describe_spec
from mpvg.recipes import recipe
from mpvg.runs.listing import find_runs, method_name, names_by_difference, plot_runs
from mpvg.training import train

BASE = replace(
    recipe(None, "digits"),
    epochs=1,
    batch_size=256,
    optim=replace(recipe(None, "digits").optim, warmup_epochs=0),
)


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
    states = {state.path.name: state for state in find_runs(some_runs)}
    assert {name: state.state.split(":")[0] for name, state in states.items()} == {
        **{"a": "complete", "b": "complete"},
        **{"c": "unfinished", "d": "damaged"},
    }
    best = f"accuracy {100 * states['a'].metrics[0]['accuracy']:.2f} %"
    assert states["a"].row() == (str(some_runs / "a"), "complete", "1/1", best, "digits", BASE.model, "mpvg", "0")
    assert states["d"].row()[2:] == ("-",) * 6
    assert main(["runs", str(some_runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["run", "state", "epochs", "best", "data", "model", "method", "seed"]
    assert len(printed[: printed.index("")]) == 5
    assert main(["runs", str(some_runs / "a")]) == 0
    alone = capsys.readouterr().out
    assert "complete" in alone
    assert "mean" not in alone


def test_complete_runs_that_differ_in_the_seed_have_a_mean(some_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the interval that scipy gives; a copy of a run is no repetition."""
    shutil.copytree(some_runs / "a", some_runs / "deep/a again")
    assert main(["runs", str(some_runs)]) == 0
    shutil.rmtree(some_runs / "deep/a again")
    titles, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert titles.split() == ["runs", "seeds", "last", "epoch,", "mean", "(95", "%)"]
    values = [runs.load(some_runs / name).metrics()[-1]["accuracy"] for name in "ab"]
    low, high = scipy.stats.t.interval(0.95, 1, np.mean(values), scipy.stats.sem(values))
    shown = f"accuracy {100 * np.mean(values):.2f} % ({100 * low:.2f} % to {100 * high:.2f} %)"
    assert [row.split(maxsplit=2)[1:] for row in rows] == [["mpvg", f"2      {shown}"]]
    assert rows[0].startswith(f"{BASE.model}, mpvg ")


def test_seeds_of_a_run_are_one_curve(some_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    original = figures.lines

    def recording(curves: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.update(curves)
        return original(curves, *args, **kwargs)

    monkeypatch.setattr(figures, "lines", recording)
    plot_runs([some_runs], "nll", some_runs / "curves.png")
    expected = [[runs.load(some_runs / name).metrics()[0]["nll"]] for name in "ab"]
    assert drawn["mpvg"] == expected
    assert list(drawn) == ["mpvg", "gap"]
    assert (some_runs / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "nowhere"], "no run in nowhere; give a folder that `mpvg train` made"),
        (["plot", "{}", "--key", "acuracy"], "no run has 'acuracy' yet; allowed: accuracy, "),
        (["plot", "{}", "--out", "{}/x.xyz"], "x.xyz' is not allowed; give a file that ends in .png, .svg or .pdf"),
        (["plot", "{}", "--out", "{}/none/x.png"], "x.png' is not allowed; give the name of a file in a folder that"),
        (["plot", "{}/d"], "no run has a number to draw yet; allowed: nothing, before an epoch ends"),
    ],
)
def test_what_cannot_be_listed_or_drawn_is_refused(
    arguments: list[str], message: str, some_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(some_runs) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_curves_are_named_by_what_differs() -> None:
    def names(*configs: RunConfig) -> list[str]:
        return list(names_by_difference({config.digest(): config for config in configs}).values())

    own = replace(BASE, method={"first_layer": 1, "last_index": 3})
    assert names(BASE) == ["vit_mini_patch2_8, mpvg"]
    assert names(BASE, replace(BASE, method="gap"), own) == ["mpvg", "gap", "mpvg, last_index=3"]
    assert names(BASE, replace(BASE, lr=0.5)) == ["lr=0.002", "lr=0.5"]
    assert names(BASE, replace(BASE, model="vit_lite_7_patch4_32", epochs=3)) == [
        "vit_mini_patch2_8, epochs=1",
        "vit_lite_7_patch4_32, epochs=3",
    ]
    assert names(BASE, replace(BASE, optim=replace(BASE.optim, weight_decay=0.5))) == [
        "optim.weight_decay=0.2",
        "optim.weight_decay=0.5",
    ]
    same = names(BASE, replace(BASE, recipe="a"))
    assert len(set(same)) == 2
    assert all(f"recipe={recipe}" in name for name, recipe in zip(same, ("digits", "a"), strict=True))
    assert names(replace(BASE, data="a\x1b"), replace(BASE, data="b")) == ["a\\x1b", "b"]


@pytest.mark.parametrize(
    ("key", "title", "percent"),
    [(None, "accuracy", True), ("nll", "nll", False), ("top5", "top-5", True), ("lr", "lr", False)],
)
@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_curve_has_the_unit_of_its_metric(
    key: str | None, title: str, percent: bool, suffix: str, start: bytes, some_runs: Path, monkeypatch: Any
) -> None:
    given: list[Any] = []
    original = figures.lines

    def recording(*arguments: Any, **options: Any) -> Any:
        given.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(figures, "lines", recording)
    plot_runs([some_runs], key, some_runs / f"curve.{suffix}")
    ((_, shown, _, y),), percents = (given[0][0],), given[0][1]["percent"]
    assert (shown, y, percents) == (title, title, percent)
    assert (some_runs / f"curve.{suffix}").read_bytes().startswith(start)


def test_runs_are_listed_for_programs(some_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(some_runs), "--json"]) == 0
    listed = {Path(values["run"]).name: values for values in json.loads(capsys.readouterr().out)}
    assert set(listed) == {"a", "b", "c", "d"}
    run = runs.load(some_runs / "a")
    assert listed["a"] == {
        **{"run": str(some_runs / "a"), "state": "complete", "epochs_done": 1, "epochs": 1, "best_metric": "accuracy"},
        **{"best": run.metrics()[0]["accuracy"], "recipe": "digits", "data": "digits", "model": BASE.model},
        **{"method": "mpvg", "seed": 0, "digest": run.config.digest()},
    }
    assert listed["d"]["state"].startswith("damaged: ")
    assert [value for name, value in listed["d"].items() if name not in ("run", "state")] == [None] * 10
    assert main(["runs", str(some_runs), "--csv"]) == 0
    rows = {Path(row["run"]).name: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    for name, values in listed.items():
        assert rows[name] == {key: "" if value is None else str(value) for key, value in values.items()}


def test_a_spec_is_listed_as_its_nearest_method() -> None:
    for name in METHODS:
        assert describe_spec(METHODS[name]) == name
    for fields, expected in (
        ({"first_layer": 1, "last_index": 3}, "mpvg, last_index=3"),
        ({"first_layer": 1, "last_index": 0, "pool": "token"}, "mpvg, pool=token"),
        ({"pool": "token", "input_pe": False}, "default, input_pe=False"),
        ({"first_layer": 0, "last_index": 0, "hierarchical": False}, "mpvg_layer0, hierarchical=False"),
        ({"first_layer": 1, "last_index": 0}, "mpvg"),
    ):
        assert method_name(replace(BASE, method=fields)) == expected
