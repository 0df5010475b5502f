"""`mpvg runs` and `mpvg plot`: run folders listed and drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpvg import figures, runs
from mpvg.cli.main import main
from mpvg.recipes import recipe
from mpvg.runs.listing import find_runs, plot_runs
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
    plot_runs([some_runs], "nll", some_runs / "curves.png")
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
        (["plot", "{}/d"], "no run has an epoch to draw yet; allowed: nothing, before an epoch ends"),
    ],
)
def test_what_cannot_be_listed_or_drawn_is_refused(
    arguments: list[str], message: str, some_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(some_runs) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
