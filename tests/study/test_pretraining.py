"""Studies whose runs start from runs of their own arm and seed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpvg import runs
from mpvg.cli.main import main
from mpvg.study.folder import make_folder, open_folder
from mpvg.study.plan import parse_study, to_dict
from mpvg.study.replay import choose_row, replay
from mpvg.study.runner import run_cell, work
from study_text import TEXT

ARMS = TEXT.replace("  gap_again: {label: GAP again, set: {method: gap}, first_seed: 1000}\n", "").replace(
    "  again: {weights: {gap_again: 1, gap: -1}}\n", ""
)
BOTH = ARMS.replace("seeds: 2}", "seeds: 1, pretrain: {recipe: digits, set: {epochs: 1, batch_size: 700}}}")


def test_each_run_starts_from_the_best_weights_of_its_own_arm_and_seed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", parse_study(BOTH.encode(), "mini.yaml"), "tiny")
    work(folder.path)
    assert [row.status for row in folder.rows()] == ["done"] * 2
    for row in folder.rows():
        start = f"pretrained/digits/{row.arm}/seed{row.seed}"
        assert row.config["network.init"] == start  # below the study, so that a copy of it has the same digest
        first, second = runs.load(folder.path / start), runs.load(folder.path / row.run)
        assert (first.config.method, first.config.seed) == (second.config.method, second.config.seed)
        assert first.summary() is not None
        assert second.config.network.init is not None
        assert Path(second.config.network.init).resolve() == first.weights_file("best").resolve()
    again = run_cell(folder, folder.cells()[0])  # complete: recorded again, not trained again
    assert again.weights == folder.rows()[0].weights


def test_a_run_that_was_cut_goes_on_and_a_row_can_be_run_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", parse_study(BOTH.encode(), "mini.yaml"), "tiny")
    work(folder.path)
    rows = folder.rows()
    moved = tmp_path / "moved"
    shutil.copytree(folder.path, moved)
    (moved / rows[0].run / "summary.json").unlink()  # as if killed before the end
    (moved / "ledger.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds a run with another config"):
        # Its weights were another folder's: a copy of a study has rows, and new runs need a new folder.
        work(moved)
    found = replay(*choose_row(folder.ledger, 1), tmp_path / "again", folder.path)
    assert found.agrees
    assert found.lines[-1] == "the weights are the same to the bit"


def test_the_first_weights_are_the_pretrained_ones(tmp_path: Path) -> None:
    """With a rate of nearly zero the run ends where it started."""
    text = BOTH.replace("set: {epochs: 1, batch_size: 700}", "set: {epochs: 1, batch_size: 700, lr: 1.0e-12}")
    folder = make_folder(tmp_path / "out", parse_study(text.encode(), "mini.yaml"), "tiny")
    row = run_cell(folder, folder.cells()[0])
    before = load_file(runs.load(folder.path / "pretrained/digits/gap/seed0").weights_file("best"))
    after = load_file(runs.load(folder.path / row.run).weights_file("last"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before if not name.startswith("head"))


def test_the_plan_survives_a_round_trip_and_a_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = parse_study(BOTH.encode(), "mini.yaml")
    assert to_dict(study)["scales"]["tiny"]["digits"]["pretrain"]["recipe"] == "digits"
    folder = make_folder(tmp_path / "out", study, "tiny")
    assert open_folder(folder.path).study == study
    file = tmp_path / "mini.yaml"
    file.write_text(BOTH)
    assert main(["study", str(file), "--out", str(tmp_path / "other"), "--dry_run"]) == 0
    assert "2 runs, 0 of them done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{recipe: digitz}", "digitz"),
        ("{recipe: digits, sett: {}}", "pretrain"),
        ("{recipe: digits, seeds: 3}", "seeds"),
        ("{set: {epochs: 2}}", "recipe"),
        ("3", "pretrain"),
        ("{recipe: digits, set: {epochs: 0}}", "epochs"),
    ],
)
def test_a_pretraining_that_cannot_be_is_refused(given: str, words: str) -> None:
    text = TEXT.replace("seeds: 2}", f"seeds: 1, pretrain: {given}}}")
    with pytest.raises(ValueError, match=words):
        parse_study(text.encode(), "mini.yaml")
