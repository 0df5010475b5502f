"""Metrics that a study takes from finished runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from mpvg import create_model, runs
from mpvg.recipes import recipe
from mpvg.study.folder import make_folder
from mpvg.study.measures import RISE, measure
from mpvg.study.plan import parse_study
from mpvg.study.replay import choose_row, replay
from mpvg.study.runner import work
from mpvg.training import train
from study_text import TEXT

TWICE = TEXT.replace("margins: {", f"margins: {{{RISE}: 0.05, ")


def test_the_rise_is_that_of_a_network_made_for_twice_the_size(tmp_path: Path) -> None:
    config = replace(recipe("digits"), method="mpvg", epochs=1, threads=1, device="cpu", out=str(tmp_path / "run"))
    train(config, quiet=True)
    run = runs.load(tmp_path / "run")
    model = run.model()
    large = create_model(config.model, "mpvg", num_classes=10, in_chans=run.info.in_chans, img_size=16).eval()
    weights = model.state_dict()
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], (8, 8), num_prefix_tokens=0)
    large.load_state_dict(weights)
    batches = list(run.validation(torch.device("cpu")).epoch())
    images, targets = torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches])
    resized = F.interpolate(images, size=16, mode="bicubic", antialias=True)
    with torch.inference_mode():
        rise = F.cross_entropy(large(resized), targets) - F.cross_entropy(model(images), targets)
    assert abs(rise) > 0.001
    assert measure(run.path, [RISE, "nll"]) == {RISE: pytest.approx(float(rise), abs=1e-5)}
    assert measure(run.path, ["nll"]) == {}


def test_a_study_that_asks_for_it_has_it_in_every_row_also_when_one_is_run_again(tmp_path: Path) -> None:
    study = parse_study(TWICE.encode(), "mini.yaml")
    folder = make_folder(tmp_path / "out", study, "tiny", seeds=1)
    work(folder.path)
    assert [list(row.metrics) for row in folder.rows()] == [["accuracy", "nll", RISE]] * 3
    row, others = choose_row(folder.ledger, 1)
    again = replay(row, others, tmp_path / "again", folder.path)
    assert again.agrees
    assert any(line.startswith("rise of nll at 2 x: ") for line in again.lines)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (RISE, "nll_rise", "margins: unknown metric 'nll_rise'; did you mean nll_rise_2x"),
        ("recipe: digits, set: {", "recipe: swin_tiny, set: {", "is for one image size; allowed: ViT"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_run(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in TWICE
    with pytest.raises(ValueError, match=said):
        make_folder(tmp_path / "out", parse_study(TWICE.replace(old, new).encode(), "mini.yaml"), "tiny")
    assert not (tmp_path / "out").exists()
