"""The numbers made of one pass, against stacks of the tokens at every LN, and networks that must be equal."""

import copy
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from mpvg import statistics
from mpvg.analysis.findings import Estimate, Findings, LayerFindings, summarize
from mpvg.analysis.probe import LAST, collect
from mpvg.data import DataInfo
from mpvg.models import create_model
from reference import assert_close, scattered

TINY: dict[str, Any] = {"embed_dim": 24, "num_heads": 2, "depth": 4}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_mini_patch2_8", TINY | {"img_size": 8}),
    "ViT with registers": ("vit_mini_patch2_8", TINY | {"img_size": 8, "reg_tokens": 2}),
    "ViT with registers that have no row": (
        "vit_mini_patch2_8",
        TINY | {"img_size": 8, "reg_tokens": 2, "no_embed_class": True},
    ),
    "Swin": (
        "swin_mini_patch2_28",
        {"img_size": 16, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)},
    ),
    "CeiT": ("ceit_tiny_patch16_224", TINY | {"img_size": 32, "patch_size": 8}),
    "CeiT by tokens": ("ceit_tiny_patch16_224", TINY | {"img_size": 32, "patch_size": 8, "read_from": "tokens"}),
    "T2T-ViT": ("t2t_vit_7", TINY | {"img_size": 48}),
    "ViT-Lite": ("vit_lite_6_patch4_32", TINY | {"img_size": 16}),
    "timm's": ("timm/vit_tiny_patch16_224", TINY | {"img_size": 48, "readout": "method"}),
    "timm's, averaging with class token": (
        "timm/vit_tiny_patch16_224",
        TINY | {"img_size": 48, "global_pool": "avg", "fc_norm": False},
    ),
}
NOISE = DataInfo(
    name="noise",
    class_names=tuple("abcde"),
    in_chans=3,
    img_size=8,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
    train_size=1,
    val_size=44,
)


def build(network: str, method: str, **kwargs: Any) -> Any:
    """A small network of the kind."""
    name, arguments = NETWORKS[network]
    return scattered(create_model(name, method, num_classes=5, **arguments | kwargs))


def images_for(network: str, count: int) -> Tensor:
    side = NETWORKS[network][1]["img_size"]
    return torch.randn(count, 3, side, side, dtype=torch.float64)


def findings(model: Any, images: Tensor, info: DataInfo = NOISE, groups: int = 20) -> Findings:
    batch = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(7)]
    return summarize(model, collect(model, batch, info, groups=groups))


@torch.no_grad()
def tokens_at_norms(model: Any, images: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of a plain network: inputs and outputs of each layer's LN and the Last LN, `(images, patches, channels)`."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    first = model.num_prefix_tokens

    def hook(_: Any, given: Any, made: Tensor) -> None:
        seen.append((given[0][:, first:].numpy(), made[:, first:].numpy()))

    handles = [norm.register_forward_hook(hook) for norm in [*(b.norm1 for b in model.blocks), model.norm]]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


def by_numpy_norm(x: np.ndarray, norm: Any) -> np.ndarray:
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    centered = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + norm.eps) * weight + bias)


def pes(model: Any, method: str) -> list[tuple[np.ndarray, bool]]:
    """What a plain network of 4 layers delivers to each LN, and whether it delivers anything; otherwise its raw PE."""
    raw = model.pos_embed.detach()[0].numpy()
    first = {"pvg": 1, "mpvg": 1, "pvg_token": 1, "lape_gap": 0}.get(method, 4)
    found, value = [], raw
    for layer in range(4):
        if layer >= first:
            value = by_numpy_norm(value, model.delivery.layer_norms[str(layer)])
        found.append((value, layer >= first))
    last = method in ("mpvg", "gap_last0")
    found.append((by_numpy_norm(raw, model.delivery.last_norm) if last else raw, last))
    return [(pe[model.num_prefix_tokens :], delivered) for pe, delivered in found]


def assert_layer(layer: LayerFindings, seen: tuple[np.ndarray, np.ndarray], pe: np.ndarray) -> None:
    before, after = seen
    mean, target = after.mean(axis=0).flatten(), pe.flatten()
    assert layer.r.value == pytest.approx(np.corrcoef(mean, target)[0, 1], abs=1e-10)
    each = [np.corrcoef(one.flatten(), target)[0, 1] for one in after]
    assert layer.r_each.value == pytest.approx(np.mean(each), abs=1e-10)
    assert layer.spearman == pytest.approx(scipy.stats.spearmanr(mean, target).statistic, abs=1e-10)
    cosine = mean @ target / math.sqrt((mean @ mean) * (target @ target))
    assert layer.cosine.value == pytest.approx(cosine, abs=1e-10)
    assert layer.r_before == pytest.approx(np.corrcoef(before.mean(axis=0).flatten(), target)[0, 1], abs=1e-10)
    assert_parts(layer, after.mean(axis=0), pe)
    values = np.linalg.svd(pe, compute_uv=False)
    shares = values / values.sum()
    assert layer.pe_rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)), abs=1e-9)
    side = math.isqrt(len(pe))
    assert layer.pe_spectrum == pytest.approx(statistics.spectrum(torch.from_numpy(pe), (side, side)), abs=1e-10)


def assert_parts(layer: LayerFindings, mean: np.ndarray, pe: np.ndarray) -> None:
    """Written out: every patch has its channel's mean over patches; what is left of it is positional."""
    tokens, delivered = (value - value.mean() for value in (mean, pe))
    constant = [np.tile(value.mean(axis=0), (len(value), 1)) for value in (tokens, delivered)]
    positional = [value - part for value, part in zip((tokens, delivered), constant, strict=True)]
    for name, (first, second) in (("constant", constant), ("positional", positional)):
        expected = np.corrcoef(first.flatten(), second.flatten())[0, 1]
        assert getattr(layer, f"r_{name}").value == pytest.approx(expected, abs=1e-10)
        share = (first * second).sum() / (tokens * delivered).sum()
        assert getattr(layer, f"covariance_{name}").value == pytest.approx(share, rel=1e-8)
    assert layer.covariance_constant.value + layer.covariance_positional.value == pytest.approx(1, rel=1e-9)
    assert layer.variance_constant.value == pytest.approx((constant[0] ** 2).sum() / (tokens**2).sum(), abs=1e-10)
    assert layer.pe_variance_constant == pytest.approx((constant[1] ** 2).sum() / (delivered**2).sum(), abs=1e-10)


@pytest.mark.parametrize("network", ["ViT", "ViT-Lite", "T2T-ViT", "timm's"])
@pytest.mark.parametrize("method", ["gap", "pvg", "mpvg", "default", "pvg_token", "lape_gap", "gap_last0"])
def test_every_layer_has_the_numbers_of_the_paper(network: str, method: str) -> None:
    model, images = build(network, method), images_for(network, 12)
    found, seen, delivered = findings(model, images, groups=5), tokens_at_norms(model, images), pes(model, method)
    assert [layer.name for layer in found.places] == ["0", "1", "2", "3", LAST]
    for layer, tokens, (pe, served) in zip(found.places, seen, delivered, strict=True):
        assert layer.delivered == served
        assert_layer(layer, tokens, pe)
        for value in (layer.r, layer.r_each, layer.cosine, layer.r_constant, layer.r_positional):
            assert value.interval is not None
            assert value.interval.low < value.interval.high
        for share in (layer.covariance_constant, layer.covariance_positional):
            assert (share.interval is None) == (layer.r.interval.low <= 0 <= layer.r.interval.high)
    layers = [layer for layer in found.places[:4] if layer.delivered] or found.places[:4]
    assert found.slope_layers == [int(layer.name) for layer in layers]
    slope = np.polyfit(found.slope_layers, [layer.r.value for layer in layers], 1)[0]
    assert found.slope is not None
    assert found.slope.value == pytest.approx(slope, abs=1e-10)
    assert found.slope.interval is not None
    assert len(found.missing) == int(method in ("gap", "default"))
    assert found.images == 12
    with torch.no_grad():
        assert found.accuracy == pytest.approx(float((model(images).argmax(dim=1) == 0).double().mean()))


@torch.no_grad()
def test_an_interval_is_of_the_images_of_the_groups_that_are_drawn() -> None:
    """Every 4th image is in a group; a resample has its groups' images as often as they are drawn."""
    model, images = build("ViT", "mpvg"), images_for("ViT", 22)
    found, seen, delivered = findings(model, images, groups=4), tokens_at_norms(model, images), pes(model, "mpvg")
    drawn: dict[str, list[float]] = {"r": [], "each": [], "slope": []}
    for counts in statistics.resamples(4).int().tolist():
        chosen = [image for image in range(22) for _ in range(counts[image % 4])]
        rs = [
            np.corrcoef(after[chosen].mean(axis=0).flatten(), pe.flatten())[0, 1]
            for (_, after), (pe, _) in zip(seen[:4], delivered, strict=False)
        ]
        drawn["r"].append(rs[2])
        drawn["slope"].append(np.polyfit([1, 2, 3], rs[1:], 1)[0])
    single = [np.corrcoef(one.flatten(), delivered[2][0].flatten())[0, 1] for one in seen[2][1]]
    for counts in statistics.resamples(4).int().tolist():
        drawn["each"].append(float(np.mean([r for i, r in enumerate(single) for _ in range(counts[i % 4])])))
    assert found.slope is not None
    for name, value in (("r", found.places[2].r), ("each", found.places[2].r_each), ("slope", found.slope)):
        low, high = np.percentile(drawn[name], [2.5, 97.5])
        assert value.interval == pytest.approx((2 * value.value - high, 2 * value.value - low), abs=1e-10)


# ---- what is the same at every patch, and the rest


@torch.no_grad()
def test_intervals_of_the_parts_are_of_the_images_that_are_drawn() -> None:
    """At a layer whose r has one sign in every image, so that shares of the covariance have an interval too."""
    model, images = build("ViT", "mpvg"), images_for("ViT", 22)
    found, seen = findings(model, images, groups=4).places[1], tokens_at_norms(model, images)[1][1]
    pe = pes(model, "mpvg")[1][0]
    pe = pe - pe.mean()
    constant_pe = np.tile(pe.mean(axis=0), (len(pe), 1))
    drawn: dict[str, list[float]] = {name: [] for name in ("r_constant", "r_positional", "constant", "positional")}
    for counts in statistics.resamples(4).int().tolist():
        mean = seen[[image for image in range(22) for _ in range(counts[image % 4])]].mean(axis=0)
        mean = mean - mean.mean()
        constant = np.tile(mean.mean(axis=0), (len(pe), 1))
        parts = {"constant": (constant, constant_pe), "positional": (mean - constant, pe - constant_pe)}
        for name, pair in parts.items():
            drawn[f"r_{name}"].append(np.corrcoef(*(part.flatten() for part in pair))[0, 1])
            drawn[name].append((pair[0] * pair[1]).sum() / (mean * pe).sum())
    for name, values in drawn.items():
        estimate = getattr(found, name if name.startswith("r_") else f"covariance_{name}")
        low, high = np.quantile(values, [0.025, 0.975])
        expected = (2 * estimate.value - high, 2 * estimate.value - low)
        assert estimate.interval == pytest.approx(expected, abs=1e-9), name


def with_only(model: Any, part: str) -> Any:
    """The network, to which only one part of each PE is delivered, in float32 as in training."""
    original = model.deliver

    def keep(pe: Tensor | None) -> Tensor | None:
        if pe is None:
            return None
        mean = pe.mean(dim=1, keepdim=True)
        return mean.expand_as(pe) if part == "constant" else pe - mean

    def deliver(pos: Tensor, grid: tuple[int, int] | None = None) -> Any:
        delivered = original(pos, grid)
        return delivered._replace(per_layer=tuple(map(keep, delivered.per_layer)), last=keep(delivered.last))

    model.deliver = deliver
    return model


@pytest.mark.parametrize("network", ["ViT", "Swin"])
@pytest.mark.parametrize(("only", "other"), [("constant", "positional"), ("positional", "constant")])
def test_what_a_pe_lacks_correlates_with_nothing(network: str, only: str, other: str) -> None:
    """Rounding in float32 leaves a part of 1e-8 or so, whose r would be any number."""
    model = with_only(build(network, "mpvg").float(), only)
    images = images_for(network, 40).float()
    for layer in (layer for layer in findings(model, images).places if layer.delivered):
        own, lacking = getattr(layer, f"r_{only}"), getattr(layer, f"r_{other}")
        assert math.isnan(lacking.value)
        assert lacking.interval is None
        assert own.interval is not None
        assert getattr(layer, f"covariance_{only}").value == pytest.approx(1, abs=1e-4)
        assert getattr(layer, f"covariance_{other}").value == pytest.approx(0, abs=1e-4)
        assert layer.pe_variance_constant == pytest.approx(float(only == "constant"), abs=1e-9)
        assert abs(own.value) > abs(layer.r.value)  # the tokens have both parts


@torch.no_grad()
def test_a_bias_and_a_position_code_can_have_the_same_r() -> None:
    """The network adds nothing but its PE to black images, once the same at every patch and once not."""
    found = {}
    for part in ("constant", "positional"):
        model = build("ViT", "mpvg", depth=2)
        mean = model.pos_embed.mean(dim=1, keepdim=True)
        model.pos_embed.copy_(mean.expand_as(model.pos_embed) if part == "constant" else model.pos_embed - mean)
        for linear in (model.patch_embed.proj, *(m for m in model.blocks[0].modules() if isinstance(m, nn.Linear))):
            linear.weight.zero_()
            linear.bias.zero_()
        for norm in (model.blocks[1].norm1, model.delivery.layer_norms["1"]):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        found[part] = findings(model, torch.zeros(40, 3, 8, 8, dtype=torch.float64)).places[1]
        assert found[part].r.value == pytest.approx(1, abs=1e-12)
    assert math.isnan(found["constant"].r_positional.value)
    assert found["constant"].r_constant.value == pytest.approx(1, abs=1e-12)
    assert found["positional"].r_positional.value == pytest.approx(1, abs=1e-12)


WITH_CLASS_TOKEN = [("ViT", "default"), ("ViT with registers", "lape"), ("CeiT", "default"), ("T2T-ViT", "pvg_token")]


@pytest.mark.parametrize(
    ("network", "method"), [*itertools.product(NETWORKS, ("gap", "mpvg")), *WITH_CLASS_TOKEN, ("Swin", "lape")]
)
def test_parts_exist_where_r_does_and_weigh_up_to_it(network: str, method: str) -> None:
    """In any network: r = r_constant sqrt(its shares of both variances) + the same of the positional part."""
    for layer in findings(build(network, method), images_for(network, 40)).places:
        weights = {"constant": layer.variance_constant.value * layer.pe_variance_constant}
        weights["positional"] = (1 - layer.variance_constant.value) * (1 - layer.pe_variance_constant)
        parts = {name: getattr(layer, f"r_{name}").value * math.sqrt(weight) for name, weight in weights.items()}
        assert sum(parts.values()) == pytest.approx(layer.r.value, abs=1e-9)
        assert 0 <= layer.variance_constant.value <= 1
        for name, part in parts.items():
            share = getattr(layer, f"covariance_{name}").value
            assert share * layer.r.value == pytest.approx(part, abs=1e-9)


# ---- the Last LN


@pytest.mark.parametrize("method", ["mpvg", "pvg", "gap", "pvg_token"])
def test_gamma_beta_and_their_variance_are_the_last_lns(method: str) -> None:
    """Of the population: by the count of channels, not one less."""
    model = build("ViT", method)
    last = findings(model, images_for("ViT", 3)).last
    assert last.gamma == model.norm.weight.tolist()
    assert last.beta == model.norm.bias.tolist()
    mean = sum(last.beta) / 24
    assert last.beta_variance == pytest.approx(sum((beta - mean) ** 2 for beta in last.beta) / 24, abs=1e-12)
    assert (last.class_token is not None) == (method == "pvg_token")
    assert (last.shift is not None) == (method == "mpvg")
    if last.shift is None:
        assert last.beta_variance_effective == last.beta_variance
        assert last.mean_token == last.mean_token_bare
        return
    pe = by_numpy_norm(model.pos_embed.detach()[0].numpy(), model.delivery.last_norm)
    assert last.shift == pytest.approx(list(pe.mean(axis=0)), abs=1e-10)
    assert last.beta_variance_effective == pytest.approx(np.var(np.array(last.beta) + pe.mean(axis=0)), abs=1e-10)
    assert last.mean_token != last.mean_token_bare


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_pvg_with_the_effective_beta_is_mpvg(network: str) -> None:
    """The same answers, so that the variance to compare with a PVG's is the effective one."""
    mpvg, images = build(network, "mpvg"), images_for(network, 6)
    last = findings(mpvg, images).last
    assert last.shift is not None
    pvg = build(network, "pvg")
    state = mpvg.state_dict()
    pvg.load_state_dict({name: value for name, value in state.items() if "last_norm" not in name}, strict=True)
    assert (pvg(images) - mpvg(images)).abs().max() > 1e-3
    pvg.norm.bias.copy_(torch.tensor(last.beta, dtype=torch.float64) + torch.tensor(last.shift, dtype=torch.float64))
    assert_close(pvg(images), mpvg(images), 1e-10)
    same = findings(pvg, images).last
    assert same.shift is None
    assert same.beta_variance == pytest.approx(last.beta_variance_effective, abs=1e-12)
    assert same.beta_variance_effective == same.beta_variance
    assert abs(last.beta_variance - last.beta_variance_effective) > 1e-4
    if not network.startswith("ViT with") and "class token" not in network:  # the mean is of patches alone
        assert same.mean_token.value == pytest.approx(last.mean_token.value, abs=1e-10)


def test_rows_and_norms_go_into_the_findings() -> None:
    model, images = build("ViT", "default"), images_for("ViT", 44)
    seen: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _, x, y: seen.extend([x[0], y]))
    with torch.no_grad():
        model(images)
    handle.remove()
    pairs = zip(*(tokens.numpy() for tokens in seen), strict=True)
    cosines = [[a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(one, other, strict=True)] for one, other in pairs]
    last = findings(model, images).last
    assert last.rows == pytest.approx(np.mean(cosines, axis=0).tolist(), abs=1e-10)
    assert last.rows is not None
    assert last.class_token is not None
    assert last.class_token.value == pytest.approx(last.rows[0], abs=1e-12)
    assert last.class_token.interval is not None
    assert last.auc_before is last.auc_behind is None
    images[:, :, :4] = -torch.tensor(NOISE.mean).div(torch.tensor(NOISE.std)).double()[:, None, None]  # black above
    last = findings(model, images, replace(NOISE, name="digits")).last
    for value in (last.auc_before, last.auc_behind):
        assert value is not None
        assert 0 < value.value < 1
        assert value.interval is not None
        assert value.interval.low < value.value < value.interval.high
    assert last.auc_before != last.auc_behind


# ---- what is not there


def values(found: Findings) -> list[Estimate]:
    kinds = ("r", "r_each", "cosine", "r_constant", "r_positional", "variance_constant")
    places = [getattr(place, kind) for place in found.places for kind in kinds]
    return [value for value in [*places, found.slope, found.last.mean_token, found.last.mean_token_bare] if value]


@pytest.mark.parametrize(("count", "enough"), [(1, False), (39, False), (40, True)])
def test_intervals_need_two_images_in_each_group(count: int, enough: bool) -> None:
    found = findings(build("ViT", "mpvg"), images_for("ViT", count))
    assert len(values(found)) == 5 * 6 + 3
    assert all((value.interval is not None) == enough for value in values(found))
    expected = f"{count} images are too few for confidence intervals; at least 40 are needed"
    assert found.missing == ([] if enough else [expected])
    assert all(math.isfinite(value.value) for value in values(found))


def test_a_method_that_delivers_nothing_is_compared_with_the_raw_pe_and_says_so() -> None:
    found = findings(build("ViT", "gap"), images_for("ViT", 40))
    assert found.slope_layers == [0, 1, 2, 3]
    assert found.missing == [
        "the method delivers no PE: tokens are compared with the raw PE, which the layers do not receive"
    ]
    swin = findings(build("Swin", "gap"), images_for("Swin", 40))
    assert [place.name for place in swin.places] == ["0", "1"]
    assert swin.slope_layers == [0, 1]
    assert [text.split(":")[0] for text in swin.missing] == ["2", "3", LAST, "the method delivers no PE"]
    assert "the raw PE belongs to another stage" in swin.missing[0]


def test_one_layer_has_no_slope() -> None:
    found = findings(build("ViT", "mpvg", depth=2), images_for("ViT", 40))
    assert found.slope_layers == [1]
    assert found.slope is None


@pytest.mark.parametrize(("network", "method"), [("ViT", "mpvg"), ("Swin", "gap"), ("CeiT", "pvg"), ("ViT", "default")])
@pytest.mark.parametrize("undefined", [False, True])
def test_findings_are_json(network: str, method: str, undefined: bool) -> None:
    """Also those of a PE that is 0, with which nothing correlates, and of black images, which have no object."""
    model, images = build(network, method), images_for(network, 40)
    if undefined:
        with torch.no_grad():
            model.pos_embed.zero_()
            for name, parameter in model.delivery.named_parameters():
                parameter.zero_()
                assert "norm" in name
    side = images.shape[-1]
    black = -torch.tensor(NOISE.mean).div(torch.tensor(NOISE.std)).double()[:, None, None]
    images[:, :, : side if undefined else side // 2] = black
    found = findings(model, images, replace(NOISE, name="digits"))
    unchanged = copy.deepcopy(found)
    text = json.dumps(found.to_dict(), allow_nan=False)
    read = json.loads(text)
    assert [place["name"] for place in read["places"]] == [place.name for place in found.places]
    assert read["images"] == 40
    for place, kept in zip(read["places"], found.places, strict=True):
        for name in ("r", "r_each", "cosine", "r_constant", "r_positional"):
            if undefined:
                assert place[name] == {"value": None, "interval": None}
            else:
                assert place[name]["value"] == getattr(kept, name).value
                assert place[name]["interval"] == list(getattr(kept, name).interval)
        assert (place["pe_rank"] is None) == (place["spearman"] is None) == undefined
        assert all((share is None) == undefined for share in place["pe_spectrum"])
    if network != "CeiT":
        assert (read["last"]["auc_before"]["value"] is None) == undefined
    assert str(found) == str(unchanged)  # to_dict leaves what it is of alone


# ---- refusals


def batches(network: str) -> list[tuple[Tensor, Tensor]]:
    return [(images_for(network, 4), torch.zeros(4, dtype=torch.int64))]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["blocks.1.attn.qkv.weight", "pos_embed", "delivery.layer_norms.2.bias", "head.bias"])
def test_weights_without_value_are_refused(part: str, value: float) -> None:
    model = build("ViT", "mpvg")
    with torch.no_grad():
        model.get_parameter(part).view(-1)[0] = value
    with pytest.raises(
        ValueError, match="the outputs of the network contain NaN or infinite values; use another checkpoint"
    ):
        collect(model, batches("ViT"), NOISE)
    assert model.probe is None


def test_no_image_is_refused() -> None:
    model = build("ViT", "mpvg")
    with pytest.raises(ValueError, match="no image could be read; give data with readable images"):
        collect(model, [], NOISE)
    assert model.probe is None


def test_a_network_whose_read_out_has_no_ln_on_the_tokens_is_refused() -> None:
    """timm's own average pooling normalizes the mean: there is no Last LN that tokens go through."""
    network = "timm's, averaging with class token"
    model = build(network, "pvg", fc_norm=True)
    assert isinstance(model.norm, nn.Identity)
    with pytest.raises(ValueError, match="no Last LN with weight and bias on its tokens.*readout='method'"):
        collect(model, batches(network), NOISE)
    collect(build(network, "pvg", fc_norm=True, readout="method"), batches(network), NOISE)
