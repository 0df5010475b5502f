"""`mpvg readout`, `mpvg resolutions` and `mpvg analyze timm/<name>`: questions about a trained network."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mpvg.analysis import linear_probe, plain, readout, readouts, resolutions
from mpvg.analysis.findings import Estimate
from mpvg.analysis.paired import MARGIN, images_needed, judge, note, paired_difference
from mpvg.analysis.sensitivity import CachedBatches
from mpvg.cli.main import main
from mpvg.data import ImageBatch
from mpvg.models import create_model
from mpvg.models.tokens import TokenReader, layers_of

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "num_classes": 3}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL | {"patch_size": 14}),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "rope": ("vit_base_patch16_rope_224", SMALL | {"patch_size": 14}),
    "eva02": ("eva02_tiny_patch14_224", SMALL),
    "relpos": ("vit_relpos_small_patch16_224", SMALL | {"patch_size": 14}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56, "num_classes": 3},
    ),
}


def network(kind: str) -> tuple[nn.Module, Tensor]:
    name, arguments = NETWORKS[kind]
    model: Any = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key:  # so that the Last LN is not the identity of what it normalizes
                value.add_(0.3 * torch.randn_like(value))
    return model, torch.randn(3, 3, arguments["img_size"], arguments["img_size"])


@pytest.mark.parametrize("kind", list(NETWORKS))
@torch.no_grad()
def test_tokens_are_those_that_the_networks_own_read_out_sees(kind: str) -> None:
    model, images = network(kind)
    reader = TokenReader(model)
    tokens = reader(images)
    found: Any = model
    pooled = found.forward_head(found.forward_features(images), pre_logits=True)
    name = "token" if found.global_pool == "token" else "mean_then_norm" if reader.is_late else "mean"
    torch.testing.assert_close(readouts.read_out(reader, tokens, name), pooled, rtol=1e-5, atol=1e-5)
    assert len(layers_of(model)) == 2
    can, reasons = readouts.choose(reader, None)
    assert set(can) | set(reasons) == set(readouts.READOUTS)
    assert ("token" in can, "mean_registers" in can) == (kind not in ("relpos", "swin"), kind == "registers")


@torch.no_grad()
def test_read_outs_follow_their_definitions() -> None:
    model, images = network("registers")
    reader = TokenReader(model)
    tokens = reader(images)
    norm: Any = reader.last_norm
    after = F.layer_norm(tokens.before, (16,), norm.weight, norm.bias, norm.eps)
    expected = {
        "token": after[:, 0],
        "mean": after[:, 5:].mean(1),
        "mean_then_norm": norm(tokens.before[:, 5:].mean(1)),
        "mean_registers": after[:, 1:].mean(1),
        "both": torch.cat([after[:, 0], after[:, 5:].mean(1)], 1),
        "max": after[:, 5:].max(1).values,
    }
    for name, value in expected.items():
        torch.testing.assert_close(readouts.read_out(reader, tokens, name), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_probe.attend(after, torch.zeros(16)), after.mean(1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has no tokens"):
        TokenReader(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    model, images = network("vit")
    with torch.no_grad():
        model.get_parameter("pos_embed")[0, 0] = value
    with pytest.raises(ValueError, match="'token' has values that are NaN or infinite; use another checkpoint"):
        readouts.extract(model, [ImageBatch(images, torch.tensor([0, 1, 2]))], ["token"], images=3)


def newton(x: Tensor, y: Tensor, classes: int, strength: float) -> float:
    """The smallest loss, by damped Newton steps on all weights and biases."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    size = x.shape[1]
    w = torch.zeros(classes * size, dtype=torch.float64)
    penalty = strength * torch.cat([torch.ones(size - 1), torch.zeros(1)]).double().repeat(classes)
    onehot = F.one_hot(y, classes).double()

    def loss(w: Tensor) -> float:
        return float(F.cross_entropy(x @ w.view(classes, size).T, y) + (penalty * w * w).sum() / 2)

    for _ in range(30):
        p = (x @ w.view(classes, size).T).softmax(1)
        gradient = ((p - onehot).T @ x / len(x)).flatten() + penalty * w
        blocks = torch.einsum("nk,nkl->nkl", p, torch.eye(classes).double() - p[:, None])
        hessian = torch.einsum("nkl,ni,nj->kilj", blocks, x, x).reshape(len(w), len(w)) / len(x)
        step = torch.linalg.lstsq(hessian + penalty.diag() + 1e-9 * torch.eye(len(w)).double(), gradient).solution
        rate = 1.0
        while loss(w - rate * step) > loss(w) and rate > 1e-6:
            rate /= 2
        w = w - rate * step
    return loss(w)


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_probe_has_the_loss_of_newtons_method(strength: float) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data[:300, 16:40]) / 16, torch.tensor(digits.target[:300])
    probe = linear_probe.fit_probe(x, y, 10, strength)
    loss = F.cross_entropy(probe.logits(x), y) + strength / 2 * probe.weight.square().sum()
    assert float(loss) == pytest.approx(newton(x, y, 10, strength), abs=1e-4)


def test_more_channels_than_images_give_the_same_probe() -> None:
    """Copies of the channels, each divided by the root of their number, leave the penalized problem as it is."""
    x, y = torch.randn(40, 12).double(), torch.arange(40) % 3
    fitted = linear_probe.fit_probe(x, y, 3, 0.1)
    wide = torch.cat([x] * 5, dim=1) / 5**0.5
    span = torch.linalg.qr(wide.T).Q
    inside = linear_probe.fit_probe(wide @ span, y, 3, 0.1)
    torch.testing.assert_close(inside.logits(wide @ span), fitted.logits(x), atol=1e-3, rtol=0)
    test = torch.arange(40) < 8
    assert linear_probe.probe_fold(torch.randn(40, 5000), y, 3, test).nll > 0  # not minutes


def test_attention_probe_of_few_images_takes_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, original = itertools.count(), linear_probe.attend
    monkeypatch.setattr(linear_probe, "attend", lambda *given: (next(steps), original(*given))[1])
    linear_probe.fit_query(torch.randn(2, 3, 4).half(), torch.tensor([0, 1]), 2, torch.arange(2), 0)
    assert next(steps) == 300


def test_folds_deal_out_each_class_and_refuse_too_few() -> None:
    targets = torch.tensor([0] * 20 + [1] * 10)
    folds = linear_probe.split_folds(targets, 5, 0)
    assert [int(((folds == f) & (targets == 0)).sum()) for f in range(5)] == [4] * 5
    assert torch.equal(folds, linear_probe.split_folds(targets, 5, 0))
    with pytest.raises(ValueError, match="fewer than the 31 folds"):
        linear_probe.split_folds(targets, 31, 0)
    with pytest.raises(ValueError, match="of one class"):
        linear_probe.split_folds(torch.zeros(9, dtype=torch.int64), 3, 0)


@pytest.mark.parametrize(("folds", "share"), [(True, 1 / 5 + 1 / 4), (False, 1 / 5)], ids=["folds", "images"])
def test_paired_difference_is_students_t_corrected_for_folds(folds: bool, share: float) -> None:
    from scipy.stats import t

    values = [0.001, 0.003, 0.002, 0.004, 0.0]
    found = paired_difference(values, folds=folds)
    variance = sum((v - 0.002) ** 2 for v in values) / 4
    error = math.sqrt(variance * share)
    assert found.difference == pytest.approx(0.002)
    assert found.interval.high == pytest.approx(0.002 + t.ppf(0.975, 4) * error)
    assert found.p == pytest.approx(2 * t.sf(0.002 / error, 4))
    assert found.p_equivalent == pytest.approx(t.sf((MARGIN - 0.002) / error, 4))


def test_attention_probe_finds_the_token_that_tells_the_class() -> None:
    targets = torch.arange(120) % 2
    tokens = 0.1 * torch.randn(120, 9, 4)
    tokens[:, 5, 0] += 4.0  # what marks the token
    tokens[:, 5, 1] += 2.0 * targets - 1
    query = linear_probe.fit_query(tokens.half(), targets, 2, torch.arange(120), 0)
    weights = (tokens @ query / 2).softmax(1)[:, 5].mean()
    assert float(weights) > 0.3


def test_words_of_a_comparison() -> None:
    def scored(name: str, values: list[float]) -> readout.Scored:
        mean = Estimate(sum(values) / len(values))
        return readout.Scored(name, mean, mean, [linear_probe.Score(value, 1.0) for value in values])

    best = scored("mean", [0.90, 0.91, 0.90, 0.91, 0.90])
    same, worse = scored("max", [0.90, 0.91, 0.90, 0.909, 0.90]), scored("token", [0.7, 0.72, 0.7, 0.71, 0.7])
    noisy = scored("both", [0.95, 0.8, 0.93, 0.85, 0.9])
    words = {c.second: c.word for c in readout.compare([best, same, worse, noisy], 500) if c.first == "mean"}
    assert words["max"] == "equivalent within 1 point"
    assert words["token"] == "higher"
    assert words["both"].startswith("undecided: needs ")
    # z of 0.95 and 0.9 exclude a difference; of 1 - 0.05 / 8 and 0.8, with four pairs, find one
    assert images_needed(0.01, 100, 1) == 860  # (1.645 + 1.282) ** 2 = 8.56
    assert images_needed(0.01, 100, 4) == 1200  # (2.498 + 0.842) ** 2 = 11.15
    sentence = readout.conclude([best, same, worse, noisy], readout.compare([best, same, worse, noisy], 500))
    assert sentence.startswith("Use mean (")
    assert "higher than token" in sentence


def offset_reference(maps: Tensor, new: int) -> Tensor:
    """DINOv2's resampling of maps `(1, D, old, old)`, point by point: the cubic of -0.75, borders repeated."""
    old = maps.shape[-1]
    scale = (new + 0.1) / old
    matrix = torch.zeros(new, old, dtype=torch.float64)
    a = -0.75
    for i in range(new):
        x = (i + 0.5) / scale - 0.5
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - k)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d < 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(k, 0), old - 1)] += w
    return matrix @ maps.double() @ matrix.T


@torch.no_grad()
def test_resampling_follows_its_equations_and_the_chain_starts_from_it() -> None:
    model: Any = create_model("vit_mini_patch4_28", "mpvg", in_chans=1, num_classes=3).eval()
    maps = model.pos_embed.unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    bigger: Any = resolutions.at_size(model, (56, 56), "offset")
    expected = offset_reference(maps, 14).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(bigger.pos_embed.double(), expected, rtol=1e-4, atol=1e-5)
    assert tuple(bigger.patch_embed.grid_size) == (14, 14)
    own = bigger.deliver(bigger.raw_pos_embed())
    torch.testing.assert_close(own.per_layer[1], bigger.delivery.layer_norms["1"](bigger.pos_embed))
    timms: Any = create_model("vit_mini_patch4_28", "mpvg", in_chans=1, num_classes=3).eval()
    timms.load_state_dict(model.state_dict())
    timms.set_input_size(img_size=(56, 28))
    wide: Any = resolutions.at_size(model, (56, 28), "antialias")
    assert torch.equal(wide(torch.ones(2, 1, 56, 28)), timms(torch.ones(2, 1, 56, 28)))
    plain_: Any = resolutions.at_size(model, (56, 28), "bicubic")
    assert not torch.equal(plain_.pos_embed, wide.pos_embed)


def test_sizes_and_networks_that_are_refused() -> None:
    for text in ("0", "-8", "x", "8x", "8x0", "99999", "1e3", "8.5", "²"):
        with pytest.raises(ValueError, match="is not allowed"):
            resolutions.parse_size(text)
    assert resolutions.parse_size("320x224") == (320, 224)
    swin = create_model("swin_mini_patch2_28", "mpvg", in_chans=1, num_classes=3)
    with pytest.raises(ValueError, match="one image size"):
        resolutions.at_size(swin, (56, 56), "bicubic")


@torch.no_grad()
def test_importance_of_an_added_pe_leaves_the_network_as_it_was() -> None:
    model, images = network("vit")
    before = model.get_parameter("pos_embed").clone()
    batches = CachedBatches([ImageBatch(images, torch.tensor([0, 1, 2]))])
    found = plain.replace_added(model, batches, scores=True)
    assert [one.kind for one in found] == ["mean", "shuffled", "noise"]
    assert all(one.cosine < 1 and one.change is not None for one in found)
    assert torch.equal(model.get_parameter("pos_embed"), before)
    model.get_parameter("pos_embed").copy_(before.mean(1, keepdim=True).expand_as(before))
    same = {one.kind: one.cosine for one in plain.replace_added(model, batches, scores=False)}
    assert same["shuffled"] == pytest.approx(1, abs=1e-6)


def test_the_three_verbs_on_a_run_and_on_timm(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained / "mpvg-0")
    out, file = tmp_path / "sizes", tmp_path / "found.json"
    assert main(["resolutions", run, "--sizes", "8", "16", "12x16", "7", "--samples", "90", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "size 7 is left out" in printed
    assert "Choose " in printed
    page = (out / "resolutions.html").read_text()
    assert "12x16" in page
    assert "http" not in page
    assert (
        main(["readout", run, "--samples", "90", "--folds", "3", "--readouts", "mean", "max", "--json", str(file)]) == 0
    )
    found = json.loads(file.read_text())
    assert found["split"] == "val"
    assert {one["name"] for one in found["scored"]} == {"mean", "max"}
    assert all(len(one["folds"]) == 3 for one in found["scored"])
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10, in_chans=1).state_dict(), weights)
    told = ["--data", "digits", "--checkpoint", str(weights), "--images", "8", "--out", str(tmp_path / "report")]
    assert main(["analyze", "timm/test_vit", *told]) == 0
    assert "not there: layers" in capsys.readouterr().out
    values = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(values["places"]) == len(layers_of(timm.create_model("test_vit"))) + 1
    assert values["replaced"][0]["change"] is not None
    assert "http" not in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("readout digits --model timm/test_vit", "has random weights without --checkpoint"),
        ("readout digits --model timm/test_vi --random", "unknown timm model"),
        ("readout digits --model resnet50 --random", "timm/<name>"),
        ("readout digits --model timm/test_resnet --random --samples 20", "has no tokens"),
        ("readout digits --model timm/test_vit --checkpoint RUN/config.yaml", "no code in it was run"),
        ("readout RUN --readouts token", "has no class token"),
        ("readout RUN --readouts men", "unknown read-out"),
        ("readout RUN --samples 3", "fewer than the 10 folds"),
        ("readout RUN --folds 1", "folds is 1"),
        ("readout RUN --checkpoint FILE", "allowed for a run"),
        ("readout nowhere RUN", "neither a data set nor a folder"),
        ("resolutions RUN --sizes 0", "is not allowed"),
        ("resolutions RUN --sizes 7", "not divisible"),
        ("resolutions nowhere --sizes 8", "holds no run"),
        ("analyze timm/test_vit --random", "--data"),
        ("analyze timm/test_vit --data digits", "has random weights"),
        ("analyze RUN --checkpoint FILE", "allowed for a run"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(trained: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(arguments.replace("RUN", str(trained / "gap-0")).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_few_images_without_a_difference_are_no_equivalence() -> None:
    same = readout.Scored("mean", Estimate(1.0), Estimate(0.0), [linear_probe.Score(1.0, 0.0)] * 5)
    pair = readout.compare([same, same], 40)[0]
    assert pair.word == "undecided: needs 301 images"
    assert judge([paired_difference([0.0] * 40)], 40) == [(1.0, "undecided: needs 301 images")]
    assert readout.compare([same, same], 400)[0].word == "equivalent within 1 point"


def test_equal_accuracies_have_a_width_and_the_lower_nll_is_first() -> None:
    scores = {"token": 0.2, "mean": 0.1}
    scored = [
        readout.Scored(name, Estimate(1.0), Estimate(nll), [linear_probe.Score(1.0, nll)] * 5)
        for name, nll in scores.items()
    ]
    pair = readout.compare(scored, 60)[0]
    assert list(pair.found.interval) == pytest.approx([-0.05, 0.05])  # three of sixty
    features = readouts.Features(
        vectors={name: torch.eye(2)[torch.arange(40) % 2].double() * 5 for name in scores},
        tokens=None,
        targets=torch.arange(40) % 2,
    )
    found = readout._score(features, "mean", torch.arange(40) % 4, 4, 2, 0)
    assert found.accuracy.interval is not None
    assert list(found.accuracy.interval) == pytest.approx([1 - 3 / 40, 1])
    half = [readout.Scored(name, Estimate(0.5), Estimate(1.0), [linear_probe.Score(0.5, 1.0)] * 5) for name in scores]
    assert readout.compare(half, 60)[0].found.interval == (0, 0)  # equal folds, whose images may differ
    assert note([pair.word]) == [
        "needs N images: with N images, a difference of 1 point would be found; larger ones need fewer"
    ]
    assert note(["higher", "lower"]) == [
        "the last column is corrected for the number of comparisons; the intervals are not"
    ]


def test_a_network_with_two_kinds_of_pe_says_which_one_is_replaced() -> None:
    rotary = timm.create_model("eva02_tiny_patch14_224", depth=1, embed_dim=48, num_heads=2)
    assert plain._inside(rotary)
    assert isinstance(rotary.pos_embed, nn.Parameter)
    assert plain._inside(timm.create_model("test_vit_relpos"))
    assert not plain._inside(timm.create_model("test_vit"))
