"""Anyone's run folders as a table: grouping by the one difference, and refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpvg import training
from mpvg.cli.main import main
from mpvg.recipes import recipe, scale_schedule
from mpvg.study.compare import _Given, _value, compare

BASE = replace(scale_schedule(recipe("digits"), 1), batch_size=700, threads=1, device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds, and one run with another learning rate."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("gap", "pvg"):
        for seed in (0, 1):
            training.train(replace(BASE, method=method, seed=seed, out=str(root / f"{method}{seed}")), quiet=True)
    training.train(replace(BASE, method="gap", lr=1e-3, out=str(root / "slow")), quiet=True)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs", symlinks=True))


def runs(root: Path, *names: str) -> list[Path]:
    return [root / name for name in names or ("gap0", "gap1", "pvg0", "pvg1")]


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_runs_are_grouped_by_what_differs(root: Path) -> None:
    results = compare(runs(root))
    (setting,) = results.settings
    assert [arm.label for arm in setting.arms] == ["gap", "pvg"]
    summaries = [json.loads((root / f"pvg{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert setting.arms[1].values == {name: [s[name] for s in summaries] for name in ("nll", "accuracy")}
    (result,) = setting.contrasts["nll"]
    gap = [json.loads((root / f"gap{seed}" / "summary.json").read_text())["nll"] for seed in (0, 1)]
    assert result.difference == pytest.approx(np.mean([s["nll"] for s in summaries]) - np.mean(gap))
    assert list(results.study.margins) == ["nll", "accuracy"], "the end point is the loss"
    flipped = compare(runs(root), reference="pvg", margins={"nll": 0.5}).settings[0].contrasts["nll"][0]
    assert flipped.difference == pytest.approx(-result.difference)
    assert flipped.margin == 0.5


def test_a_number_can_be_what_differs(root: Path) -> None:
    results = compare(runs(root, "gap0", "gap1", "slow"))
    assert [arm.label for arm in results.settings[0].arms] == ["0.002", "0.001"]
    assert results.study.question == "What does lr change?"


def test_long_values_that_differ_at_their_end_are_not_one_group() -> None:
    rates = [{**{f"^layers.{number}$": 2.0 for number in range(40)}, "^norm$": factor} for factor in (1.0, 2.0)]
    first, second = (_value(_Given(None, None, {"optim.rates": one}), "optim.rates") for one in rates)
    assert first != second


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("gap0", "gap1"), "the runs differ in nothing but seeds"),
        (("gap0", "pvg1", "slow"), "the runs differ in method (gap, pvg), lr (0.002, 0.001)"),
        (("gap0", "gap0", "pvg0"), "method gap has the seed 0 twice"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(root: Path, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match="run") as caught:
        compare(runs(root, *names))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("file", "field", "name"),
    [
        ("data.json", "train_hash", "data"),
        ("environment.json", "hardware", "hardware"),
        ("environment.json", "versions", "torch"),
    ],
)
def test_other_data_torch_or_hardware_must_be_asked_for(root: Path, file: str, field: str, name: str) -> None:
    values = json.loads((root / "pvg1" / file).read_text())[field]
    change(root / "pvg1" / file, **{field: {**values, "torch": "1.0"} if isinstance(values, dict) else "other"})
    with pytest.raises(ValueError, match=f"the runs differ in {name} .* or give --allow {name}"):
        compare(runs(root))
    results = compare(runs(root), allow=[name])
    assert any(f"differ in {field.replace('_', ' ')}" in r or name in r for r in results.settings[0].remarks)


def test_an_incomplete_run_is_refused(root: Path) -> None:
    (root / "pvg1" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"pvg1 is not complete; continue it with `mpvg train --resume"):
        compare(runs(root))


def test_a_run_whose_metric_is_no_number_is_refused(root: Path) -> None:
    file = root / "pvg1" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"nll": math.nan}))
    with pytest.raises(ValueError, match=r"pvg1: nll is nan, which cannot be tested; leave the run out"):
        compare(runs(root))


def test_a_damaged_environment_is_named(root: Path) -> None:
    (root / "pvg1" / "environment.json").write_text("x")
    with pytest.raises(ValueError, match=r"environment.json is missing or damaged .*; restore it"):
        compare(runs(root))


def test_a_field_may_be_allowed_to_differ(root: Path) -> None:
    results = compare(runs(root, "gap1", "slow", "pvg0", "pvg1"), allow=["lr"])
    assert [len(arm.values["nll"]) for arm in results.settings[0].arms] == [2, 2]
    with pytest.raises(ValueError, match="--allow: unknown name 'lrr'; did you mean lr"):
        compare(runs(root), allow=["lrr"])


def test_the_command_prints_every_form_and_writes_all(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "slow")
    assert main(["compare", str(root), "--out", str(tmp_path / "out")]) == 0
    assert "runs: pvg - gap: nll" in capsys.readouterr().out
    assert (tmp_path / "out" / "bars.svg").exists()
    for flag, begins in (
        ("--markdown", "# compare: What"),
        ("--latex", "% compare: What"),
        ("--csv", "setting,"),
        ("--json", "{"),
    ):
        assert main(["compare", str(root), flag]) == 0
        assert capsys.readouterr().out.startswith(begins)
    assert main(["compare", str(root), "--margin", "nll=none"]) == 2
    assert "--margin is 'nll=none'; allowed: METRIC=VALUE" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert "no run in" in capsys.readouterr().err


def test_the_first_run_is_the_reference_also_before_a_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gap0", "gap1"):
        shutil.move(root / name, tmp_path / "gaps" / name)
    assert main(["compare", str(root / "pvg0"), str(root / "pvg1"), str(tmp_path / "gaps")]) == 0
    assert "runs: gap - pvg: nll" in capsys.readouterr().out
