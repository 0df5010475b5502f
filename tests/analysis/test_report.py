"""`mpvg analyze`, from run folders to files: what is written, what it says, and what it does with bad input."""

import csv
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import load_file

from mpvg import figures, runs
from mpvg.analysis import drawing, report
from mpvg.analysis.findings import AnalyzedRun, Scores
from mpvg.analysis.report import Options
from mpvg.cli.main import main
from mpvg.runs.checkpoints import Checkpoint, save_checkpoint
from mpvg.runs.metrics import read_metrics
from mpvg.seeding import seed_everything


@pytest.fixture(scope="module")
def of_30_images(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run, whose name and that of one that is missing are HTML, on few images."""
    root = tmp_path_factory.mktemp("few")
    evil = root / "<img src=x onerror=alert(1)>"
    shutil.copytree(trained / "mpvg-0", evil, symlinks=True)
    report.analyze([evil, root / "</script><b>"], root / "out", Options(images=30))
    return root / "out"


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_all_numbers_and_figures_are_written(written: Path) -> None:
    found = results(written)
    assert [Path(one["run"]).name for one in found["runs"]] == ["mpvg-0", "mpvg-1", "gap-0"]
    assert [one["group"] for one in found["runs"]] == ["mpvg", "mpvg", "gap"]
    assert found["problems"] == {}
    for one in found["runs"]:
        assert [place["name"] for place in one["trained"]["places"]] == ["0", "1", "2", "3", "Last LN"]
        assert one["trained"]["images"] == 360
    with (written / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 5  # runs, trained and untrained, places
    places = found["runs"][0]["trained"]["places"]
    assert [float(row["r"]) for row in rows[:5]] == [place["r"]["value"] for place in places]
    for field in ("r_constant", "r_positional", "covariance_constant", "covariance_positional", "variance_constant"):
        assert [float(row[field]) for row in rows[:5]] == [place[field]["value"] for place in places]
    assert [float(row["pe_variance_constant"]) for row in rows[:5]] == [p["pe_variance_constant"] for p in places]
    assert [row["delivered"] for row in rows[:5]] == ["False", "True", "True", "True", "True"]
    names = {path.name for path in (written / "figures").iterdir()}
    drawn = [
        "fig2-0-mpvg-0",
        "fig2-1-gap-0",
        "fig4",
        "fig6",
        "fig6-rows",
        "fig7",
        "importance",
        "parts",
        "pe-frequency",
        "pe-rank",
    ]
    assert names == {f"{name}.{kind}" for name in (*drawn, "resolutions", "translation") for kind in ("png", "pdf")}


def test_the_accuracy_is_that_of_the_run(trained: Path, written: Path) -> None:
    """All 360 images are fewer than the 1,000 that are asked for."""
    for one in results(written)["runs"]:
        assert one["trained"]["accuracy"] == read_metrics(trained / Path(one["run"]).name)[-1]["accuracy"]


def test_the_same_command_writes_the_same_numbers(
    trained: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two figures are drawn again; tests/test_figures.py draws all kinds twice."""
    save = figures.save
    texts: list[str] = []

    def save_two(figure: Figure, *paths: Path) -> None:
        texts.extend(text.get_text() for text in figure.findobj(Text))
        if paths[0].stem in ("fig4", "fig7"):
            save(figure, *paths)
            return
        for path in paths:
            shutil.copy(written / "figures" / path.name, path)

    monkeypatch.setattr(figures, "save", save_two)
    report.analyze([trained / name for name in ("mpvg-0", "mpvg-1", "gap-0")], tmp_path, Options(sensitivity_images=20))
    for name in ("layers.csv", "figures/fig4.pdf", "figures/fig7.png", "report.html"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name
    assert results(tmp_path)["runs"] == results(written)["runs"]
    # A figure can go into any paper: it does not name the figures of this one; the captions on the page do.
    assert "Norms of the tokens" in texts
    assert [text for text in texts if re.search(r"\bFigs?\b", text)] == []


def test_the_first_table_has_what_the_run_recorded_on_all_images(trained: Path, tmp_path: Path) -> None:
    """Only of the checkpoint that is analyzed; weights without a record, and other data, are scored on the images."""
    run, options = runs.load(trained / "mpvg-0"), Options(images=40)
    (line,) = run.metrics()
    assert report.analyze_run(run, options).recorded == Scores(line["accuracy"], line["nll"], 360)
    everything = report.analyze_run(run, Options(data="digits"))
    assert everything.recorded is None
    assert everything.measured.images == 360
    assert everything.measured.accuracy == line["accuracy"]
    assert everything.measured.nll == pytest.approx(line["nll"], abs=1e-5)
    copied = tmp_path / "mpvg-0"
    shutil.copytree(trained / "mpvg-0", copied, symlinks=True)
    (copied / "metrics.jsonl").write_text(json.dumps(line | {"step": line["step"] + 1}) + "\n")
    assert report._recorded(runs.load(copied), options) is None


def test_the_control_is_the_network_that_the_training_began_with(trained: Path) -> None:
    """Its seed's weights: those of the run's first checkpoint less one epoch, so it is built anew and compared."""
    run = runs.load(trained / "mpvg-1")
    seed_everything(1)
    expected = run.task().build_model(init=True).state_dict()
    for name, value in run.initial_model().state_dict().items():
        assert torch.equal(value, expected[name])
    other = runs.load(trained / "mpvg-0").initial_model().state_dict()
    assert not torch.equal(other["pos_embed"], expected["pos_embed"])


@pytest.mark.parametrize("images", [7, 90, 200, 360, 1000])
def test_a_share_is_spread_over_the_whole_set(trained: Path, images: int) -> None:
    """Validation sets are in the order of their classes."""
    run = runs.load(trained / "mpvg-0")
    device = torch.device("cpu")
    every = torch.cat([some for some, _ in run.validation(device).epoch()])
    chosen = torch.cat([some for some, _ in run.validation(device, images=images, batch_size=7).epoch()])
    assert len(chosen) == min(images, 360)
    same = (every.flatten(1) == chosen.flatten(1)[:, None]).all(dim=2)
    numbers = [-1]
    for row in same:  # some of the images are equal: the next one after the last
        numbers.append(next(int(n) for n in row.nonzero() if n > numbers[-1]))
    gaps = [b - a for a, b in itertools.pairwise([*numbers[1:], 360])]
    assert numbers[1] == 0
    assert max(gaps) - min(gaps) <= 1


# ---- bad input


def test_a_run_that_cannot_be_analyzed_is_named_and_the_rest_is_made(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "draw", lambda groups, folder: {})  # most of the time of a report, and not looked at
    no_checkpoint, damaged, nan = (tmp_path / name for name in ("no-checkpoint", "damaged", "nan"))
    for path in (no_checkpoint, damaged, nan):
        shutil.copytree(trained / "mpvg-0", path, symlinks=True)
    shutil.rmtree(no_checkpoint / "checkpoints")
    with (damaged / "checkpoints/last/model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02\x03")
    _spoil(nan)
    paths = [str(path) for path in (no_checkpoint, trained / "gap-0", damaged, nan, tmp_path / "nothing")]
    code = main(["analyze", *paths, "--out", str(tmp_path / "out"), "--images", "60"])
    said = capsys.readouterr()
    assert code == 0
    problems = results(tmp_path / "out")["problems"]
    assert problems.keys() == set(paths) - {str(trained / "gap-0")}
    for named, word in zip(paths[2:], ("damaged", "not finite", "holds no run"), strict=True):
        assert word in problems[named]
        assert f"warning: {named} is left out: " in said.err
        assert named in (tmp_path / "out/report.html").read_text()
    assert "gap:" in said.out


def _spoil(path: Path) -> None:
    """A NaN among the weights, in a checkpoint that is otherwise whole."""
    folder = path / "checkpoints/last"
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    state = json.loads((folder / "state.json").read_text())
    shutil.rmtree(path / "checkpoints")
    save_checkpoint(path, 23, Checkpoint({"model": tensors}, state), best=True)


def test_nothing_that_can_be_analyzed_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_of_another_kind_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes are named; nothing is analyzed on images that the network was not made for."""
    assert main(["analyze", str(trained / "gap-0"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("images", "beyond"), [(0, 0), (10, -1)])
def test_numbers_of_images_are_checked(trained: Path, tmp_path: Path, images: int, beyond: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 and beyond at least 0; got images={images} and beyond={beyond}"):
        report.analyze([trained / "gap-0"], tmp_path / "out", Options(images=images, sensitivity_images=beyond))


def test_too_few_images_give_no_interval_and_are_named(of_30_images: Path) -> None:
    page = (of_30_images / "report.html").read_text()
    assert "30 images are too few for confidence intervals; at least 40 are needed" in page
    (one,) = results(of_30_images)["runs"]
    assert all(place["r"]["interval"] is None for place in one["trained"]["places"])
    assert all((of_30_images / "figures" / f"{name}.png").is_file() for name in ("fig4", "fig6", "fig7"))


def test_a_method_that_delivers_nothing_says_so(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "; weights: last of each run. Commit " in page
    assert json.loads((written / "results.json").read_text())["weights"] == "last of each run"
    assert "gap-0: the method delivers no PE: tokens are compared with the raw PE" in page
    gap = results(written)["runs"][2]["trained"]
    assert not any(place["delivered"] for place in gap["places"])
    assert gap["slope_layers"] == [0, 1, 2, 3]


def test_names_in_a_page_are_text(of_30_images: Path) -> None:
    """Folder names and configs come from elsewhere."""
    page = (of_30_images / "report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "&lt;/script&gt;&lt;b&gt;" in page
    assert "<img src=x" not in page
    assert "</script><b>" not in page


# ---- groups


def test_groups_have_the_shortest_names_that_tell_them_apart(trained: Path) -> None:
    run = runs.load(trained / "mpvg-0")

    def member(**changes: Any) -> AnalyzedRun:
        one: Any = object.__new__(AnalyzedRun)
        one.__dict__.update(run=replace(run, config=replace(run.config, **changes)))
        return one

    assert list(report._group_by_config([member(), member(seed=3), member(method="pvg")])) == ["mpvg", "pvg"]
    assert list(report._group_by_config([member(), member(epochs=2)])) == ["mpvg, 1 epochs", "mpvg, 2 epochs"]
    assert len(report._group_by_config([member(), member(lr=0.5)])) == 2
