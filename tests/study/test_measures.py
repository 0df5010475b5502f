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
from mpvg.study.measures import INSIDE, RISE, measure
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


def test_what_is_measured_inside_a_network_follows_its_definition(tmp_path: Path) -> None:
    config = replace(recipe("digits"), method="mpvg", epochs=1, threads=1, device="cpu", out=str(tmp_path / "run"))
    train(config, quiet=True)
    run = runs.load(tmp_path / "run")
    model = run.model()
    images = torch.cat([batch.images for batch in run.validation(torch.device("cpu")).epoch()])
    normed: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda *hooked, number=number: normed.update({number: hooked[2]}))
    model.norm.register_forward_hook(lambda *hooked: normed.update({-1: hooked[2]}))
    with torch.inference_mode():
        model(images)
        delivered = model.deliver(model.pos_embed)
        pes = {layer: delivered.per_layer[layer] for layer in range(1, len(model.blocks))}
        pairs = [torch.stack([normed[layer].mean(0).flatten(), pe.flatten()]) for layer, pe in pes.items()]
    r = [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]
    layers = torch.tensor(list(pes), dtype=torch.float64)
    slope = float(((layers - layers.mean()) * torch.tensor(r)).sum() / (layers - layers.mean()).square().sum())
    beta, constant = model.norm.bias.detach(), delivered.last.mean(dim=(0, 1)).detach()
    norms = (normed[-1] + delivered.last).norm(dim=-1)
    bright = F.avg_pool2d((images > images.min()).float(), 2).flatten(1) >= 0.5  # patches of 2 x 2
    areas = [
        float((norm[mask][:, None] > norm[~mask]).double().mean())
        for norm, mask in zip(norms, bright, strict=True)
        if mask.any() and not mask.all()
    ]
    assert measure(run.path, INSIDE) == {
        "r": pytest.approx(sum(r) / len(r), abs=1e-5),
        "r_slope": pytest.approx(slope, abs=1e-5),
        "beta_variance": pytest.approx(float(beta.var(correction=0)), rel=1e-5),
        "beta_variance_effective": pytest.approx(float((beta + constant).var(correction=0)), rel=1e-5),
        "separation": pytest.approx(abs(sum(areas) / len(areas) - 0.5), abs=1e-5),
    }


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


def test_a_separation_needs_data_whose_objects_are_known(tmp_path: Path) -> None:
    text = TWICE.replace(RISE, "separation").replace("recipe: digits", "recipe: cells")
    with pytest.raises(ValueError, match="objects are known: digits, fashion-mnist; got cells"):
        make_folder(tmp_path / "out", parse_study(text.encode(), "mini.yaml"), "tiny")
