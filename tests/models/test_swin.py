"""Swin with a delivered PE, against a plain loop over official weights, and against timm."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, Method, as_spec
from mpvg.models import create_model, load_checkpoint
from mpvg.models.checkpoints import translate
from mpvg.models.fold import fold
from mpvg.models.swin import DeliveredSwinBlock, DeliveredSwinTransformer
from reference import assert_close, executed, ref_attention, ref_linear, ref_mlp, ref_norm, ref_patches, ref_resampled

REFUSED = ("pvg_token", "mpvg_last5", "mpvg_last8", "mpvg_last11")
OWN = DeliverySpec(input_pe=False, first_layer=0, hierarchical=False)
"""A researcher's own method, which has no name."""
WITH_OWN = {name: spec for name, spec in METHODS.items() if name not in REFUSED} | {"own": OWN}
every_method = pytest.mark.parametrize("method", WITH_OWN.values(), ids=WITH_OWN.keys())
# One of each kind: nothing delivered, layers only, Last LN only, both; chained and flat; with and without input PE.
KINDS = ["gap", "lape", "pvg", "gap_last0", "mpvg", "mpvg_flat", "own"]
every_kind = pytest.mark.parametrize("method", [WITH_OWN[name] for name in KINDS], ids=KINDS)

EPS, CLASSES = 1e-5, 5
# Windows of 3 are shifted by 1, which a shift in the wrong direction is not. Grids: 12 x 12, 6 x 6, 3 x 3; the last is
# one window. 12 x 18, 6 x 9: rows are not columns. 9 x 9, 5 x 5, 3 x 3: the mergings fill up with zeros.
SQUARE: dict[str, Any] = {"img_size": (24, 24), "window_size": 3, "depths": (2, 2, 2), "num_heads": (2, 3, 4)}
WIDE: dict[str, Any] = {"img_size": (24, 36), "window_size": 3, "depths": (2, 2), "num_heads": (2, 3)}
ODD: dict[str, Any] = {"img_size": (18, 18), "window_size": 9, "depths": (1, 2, 1), "num_heads": (2, 3, 4)}
PATCH, DIM, RATIO = 2, 12, 2
TINY = "swin_tiny_patch4_window7_224"


def build(method: Method, size: dict[str, Any], **kwargs: Any) -> nn.Module:
    fixed = {"patch_size": PATCH, "embed_dim": DIM, "mlp_ratio": RATIO, "num_classes": CLASSES}
    return create_model("swin_mini_patch2_28", method, **(fixed | size | kwargs)).double().eval()


def images(size: dict[str, Any] = SQUARE, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size["img_size"], dtype=torch.float64)


# ---- official weights: every tensor of microsoft/Swin-Transformer by its name there, and ours for each LN'


def random_norm(name: str, dim: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.3 * torch.randn(dim), f"{name}.bias": 0.3 * torch.randn(dim)}


def random_linear(name: str, dim: int, out: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(out, dim) / math.sqrt(dim), f"{name}.bias": 0.3 * torch.randn(out)}


def official_block(name: str, dim: int, heads: int, window: int) -> dict[str, Tensor]:
    return {
        **random_norm(f"{name}.norm1", dim),
        f"{name}.attn.relative_position_bias_table": torch.randn((2 * window - 1) ** 2, heads),
        f"{name}.attn.relative_position_index": torch.zeros(window**2, window**2),  # computed: must not be taken
        **random_linear(f"{name}.attn.qkv", dim, 3 * dim),
        **random_linear(f"{name}.attn.proj", dim, dim),
        **random_norm(f"{name}.norm2", dim),
        **random_linear(f"{name}.mlp.fc1", dim, RATIO * dim),
        **random_linear(f"{name}.mlp.fc2", RATIO * dim, dim),
    }


def official_weights(method: DeliverySpec, size: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights; no LN' where the method delivers nothing."""
    height, width = (side // PATCH for side in size["img_size"])
    side, last = min(height, width), len(size["depths"]) - 1
    weights = {
        "absolute_pos_embed": torch.randn(1, height * width, DIM),
        "patch_embed.proj.weight": torch.randn(DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": torch.randn(DIM),
        **random_norm("patch_embed.norm", DIM),
    }
    for stage, (depth, heads) in enumerate(zip(size["depths"], size["num_heads"], strict=True)):
        dim, window = DIM * 2**stage, min(size["window_size"], side)
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            weights |= official_block(name, dim, heads, window)
            if block % 2 and side > window:
                weights[f"{name}.attn_mask"] = torch.zeros((side // window) ** 2, window**2, window**2)
            if method.first_layer is not None:
                weights |= random_norm(f"delivery.{stage}.layer_norms.{block}", dim)
        if stage < last:
            weights[f"layers.{stage}.downsample.reduction.weight"] = torch.randn(2 * dim, 4 * dim) / math.sqrt(4 * dim)
            weights |= random_norm(f"layers.{stage}.downsample.norm", 4 * dim)
            side = (side + 1) // 2
    if method.last_index is not None:
        weights |= random_norm(f"delivery.{last}.last_norm", dim)
    weights |= random_norm("norm", dim) | random_linear("head", dim, CLASSES)
    return {name: tensor.double() for name, tensor in weights.items()}


def network(method: Method, size: dict[str, Any] = SQUARE, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """A network, and the official weights that it was filled with, to the last tensor."""
    weights = official_weights(as_spec(method), size)
    model = build(method, size, **kwargs)
    translated, layout = translate(weights, DeliveredSwinTransformer.layouts)
    assert layout is not None
    model.load_state_dict(translated, strict=True)
    return model, weights


# ---- the reference: tokens row by row, official weights


def ref_bias(places: list[tuple[int, int]], window: int, table: Tensor) -> Tensor:
    """What is added to the scores of each pair in a window, `(heads, n, n)`.

    After the cyclic shift a window may hold tokens from opposite edges of the image. They are a window or more apart,
    and do not see each other.
    """
    bias = torch.full((table.shape[1], len(places), len(places)), -math.inf, dtype=torch.float64)
    for (q, (row, column)), (k, (key_row, key_column)) in product(enumerate(places), repeat=2):
        down, right = row - key_row, column - key_column
        if abs(down) < window and abs(right) < window:
            bias[:, q, k] = table[(down + window - 1) * (2 * window - 1) + right + window - 1]
    return bias


def ref_window_attention(
    x: Tensor, grid: tuple[int, int], window: int, shift: int, weights: dict[str, Tensor], name: str
) -> Tensor:
    table = weights[f"{name}.relative_position_bias_table"]
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in product(range(grid[0]), range(grid[1])):
        key = ((row - shift) % grid[0] // window, (column - shift) % grid[1] // window)
        members.setdefault(key, []).append((row, column))
    qkv, out = ref_linear(x, weights, f"{name}.qkv"), torch.empty_like(x)
    for places in members.values():
        tokens = [row * grid[1] + column for row, column in places]
        q, k, v = qkv[tokens].split(x.shape[1], dim=1)
        out[tokens] = ref_attention(q, k, v, table.shape[1], ref_bias(places, window, table))
    return ref_linear(out, weights, f"{name}.proj")


def ref_block(
    x: Tensor, pe: Tensor | None, grid: tuple[int, int], window: int, shift: int, weights: dict[str, Tensor], name: str
) -> Tensor:
    attended = ref_norm(x, weights, f"{name}.norm1", EPS)
    attended = attended if pe is None else attended + pe
    x = x + ref_window_attention(attended, grid, window, shift, weights, f"{name}.attn")
    return x + ref_mlp(ref_norm(x, weights, f"{name}.norm2", EPS), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")


def ref_merge(x: Tensor, grid: tuple[int, int], weights: dict[str, Tensor], name: str) -> Tensor:
    """Four neighbors in the official order; zeros beyond the edge."""
    zeros, rows = torch.zeros(x.shape[1], dtype=x.dtype), []
    for row, column in product(range(0, grid[0], 2), range(0, grid[1], 2)):
        four = [(row, column), (row + 1, column), (row, column + 1), (row + 1, column + 1)]
        rows.append(torch.cat([x[r * grid[1] + c] if r < grid[0] and c < grid[1] else zeros for r, c in four]))
    return ref_norm(torch.stack(rows), weights, f"{name}.norm", EPS) @ weights[f"{name}.reduction.weight"].T


def ref_delivered(
    spec: DeliverySpec, weights: dict[str, Tensor], grid: tuple[int, int], depths: tuple[int, ...], pos: Tensor
) -> tuple[list[Tensor | None], Tensor | None]:
    """What each layer of each stage and the Last LN receive; layer 0 is served wherever a layer is."""
    received: list[Tensor | None] = []
    before = pos_0 = pos
    for stage, depth in enumerate(depths):
        if stage > 0:
            name = f"layers.{stage - 1}.downsample"
            before, pos_0 = ref_merge(before, grid, weights, name), ref_merge(pos_0, grid, weights, name)
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        for block in range(depth):
            if spec.first_layer is not None:
                before = ref_norm(
                    before if spec.hierarchical else pos_0, weights, f"delivery.{stage}.layer_norms.{block}", EPS
                )
            received.append(None if spec.first_layer is None else before)
    last = None if spec.last_index is None else ref_norm(pos_0, weights, f"delivery.{len(depths) - 1}.last_norm", EPS)
    return received, last


def ref_swin(
    weights: dict[str, Tensor],
    method: Method,
    image: Tensor,
    size: dict[str, Any] = SQUARE,
    *,
    pos: Tensor | None = None,
) -> dict[str, Any]:
    """Runs one image `(C, H, W)`; `pos` is a raw PE, `(rows, D)`, in place of the network's own."""
    spec = as_spec(method)
    grid = (image.shape[1] // PATCH, image.shape[2] // PATCH)
    pos = weights["absolute_pos_embed"][0] if pos is None else pos
    received, last = ref_delivered(spec, weights, grid, size["depths"], pos)
    x = ref_norm(ref_patches(image, weights, "patch_embed.proj", PATCH), weights, "patch_embed.norm", EPS)
    x = x + pos if spec.input_pe else x
    maps, layers = [], iter(received)
    for stage, depth in enumerate(size["depths"]):
        if stage > 0:
            x = ref_merge(x, grid, weights, f"layers.{stage - 1}.downsample")
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        window = min(size["window_size"], *grid)
        for block in range(depth):
            shift = window // 2 if block % 2 and min(grid) > window else 0
            x = ref_block(x, next(layers), grid, window, shift, weights, f"layers.{stage}.blocks.{block}")
        maps.append(x.T.reshape(-1, *grid))
    features = ref_norm(x, weights, "norm", EPS)
    features = features if last is None else features + last
    pooled = features.mean(dim=0)
    return {
        "received": received,
        "last": last,
        "maps": maps,
        "features": features.reshape(*grid, -1),
        "pooled": pooled,
        "logits": ref_linear(pooled, weights, "head"),
    }


def reference(weights: dict[str, Tensor], method: Method, batch: Tensor, key: str = "logits", **kwargs: Any) -> Tensor:
    return torch.stack([ref_swin(weights, method, image, **kwargs)[key] for image in batch])


# ---- sizes and start


COUNTS = {
    "default": 28_589_410,
    "gap": 28_589_410,
    "lape": 28_598_242,
    "lape_gap": 28_598_242,
    "pvg": 28_598_242,
    "mpvg": 28_599_778,
    "gap_last0": 28_590_946,
    "mpvg_layer0": 28_599_778,
    "mpvg_flat": 28_599_778,
    "mpvg_no_input_pe": 28_599_778,
}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_as_many_as_in_the_paper(method: str) -> None:
    """Table 1's network at full size, to the last parameter, for every method that it can run."""
    with torch.device("meta"):
        if method in REFUSED:
            with pytest.raises(ValueError, match="Swin"):
                create_model(TINY, method)
            return
        model = create_model(TINY, method)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[method]


@pytest.mark.parametrize(("name", "millions"), [("swin_small", "49.6"), ("swin_base", "87.8"), ("swin_tiny", "28.3")])
def test_the_sizes_are_the_published_ones(name: str, millions: str) -> None:
    """Beside the PE the networks are timm's, tensor by tensor."""
    name = f"{name}_patch4_window7_224"
    with torch.device("meta"):
        ours, theirs = create_model(name, "default"), timm.create_model(name)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes.pop("pos_embed") == (1, 56 * 56, ours.embed_dim)
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert f"{sum(shape.numel() for shape in shapes.values()) / 1e6:.1f}" == millions
    windows = [(block.window_size, block.shift_size) for block in ours.blocks]
    assert windows == [(block.window_size, block.shift_size) for stage in theirs.layers for block in stage.blocks]


def test_the_small_member_runs_at_its_own_size() -> None:
    model = create_model("swin_mini_patch2_28", num_classes=7).eval()
    assert model(torch.randn(2, *model.pretrained_cfg["input_size"])).shape == (2, 7)
    assert [block.shift_size for block in model.blocks] == [(0, 0), (3, 3), (0, 0), (0, 0)]


def test_what_is_drawn_beside_the_pe_is_timms() -> None:
    """From the same seed every parameter of timm's has timm's value; LN' is at 1 and 0; the PE has std 0.02."""
    size = {"img_size": 28, "patch_size": 2, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)}
    torch.manual_seed(3)
    theirs = SwinTransformer(**size).state_dict()
    torch.manual_seed(3)
    model = create_model("swin_mini_patch2_28", "mpvg")
    for key, value in model.state_dict().items():
        if key.startswith("delivery."):
            assert torch.equal(value, torch.full_like(value, float(key.endswith("weight")))), key
        elif key != "pos_embed":
            assert torch.equal(value, theirs.pop(key)), key
    assert not theirs
    assert 0.019 < model.pos_embed.std() < 0.021
    assert abs(model.pos_embed.mean()) < 0.001
    assert model.pos_embed.requires_grad


def test_pos_std_rescales_the_same_draw() -> None:
    """At std 1 the PE is exactly 50 times what it would be, and nothing else differs; also when drawn again."""
    models = []
    for pos_std in (None, 1.0):
        torch.manual_seed(3)
        models.append(create_model("swin_mini_patch2_28", "mpvg", pos_std=pos_std))
    for seed in (4, 5):
        plain, scaled = (model.state_dict() for model in models)
        for key, value in plain.items():
            assert torch.equal(scaled[key], 50 * value if key == "pos_embed" else value), key
        before = copy.deepcopy(plain)
        for model in models:
            torch.manual_seed(seed)
            model.init_weights()
        assert not torch.equal(models[0].pos_embed, before["pos_embed"])


def test_stochastic_depth_is_off_unless_asked_for() -> None:
    for options, expected in [({}, []), ({"drop_path_rate": 0.3}, [0.1, 0.2, 0.3])]:
        modules = create_model("swin_mini_patch2_28", **options).modules()
        rates = [module.drop_prob for module in modules if isinstance(module, DropPath)]
        assert rates[::2] == pytest.approx(expected)


def test_the_norms_follow_dtype_device_and_the_networks_eps() -> None:
    model = create_model("swin_mini_patch2_28", "mpvg", dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 4 + 1 + 1 + 4 + 1  # patches, layers, merging, Last LN, LN' of layers and Last LN
    assert {norm.eps for norm in norms} == {EPS}
    model = create_model("swin_mini_patch2_28", "mpvg", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# ---- values


def test_default_equals_timms_swin() -> None:
    """At full size, with copied weights and a PE of zero; with another PE, not."""
    theirs = timm.create_model(TINY).eval()
    ours: Any = create_model(TINY, "default").eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        ours.load_state_dict(theirs.state_dict() | {"pos_embed": torch.zeros_like(ours.pos_embed)}, strict=True)
        expected = theirs(image)
        assert_close(ours(image), expected, 1e-4)
        ours.pos_embed.normal_()
        assert (ours(image) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("method", "size"),
    [(spec, SQUARE) for spec in WITH_OWN.values()]
    + [(WITH_OWN[name], size) for name in ("gap", "lape", "mpvg", "own") for size in (WIDE, ODD)],
)
def test_the_network_equals_the_plain_loop(method: DeliverySpec, size: dict[str, Any]) -> None:
    """What is delivered, the map after every stage, tokens behind the Last LN, what the head receives, and logits."""
    model, weights = network(method, size)
    batch = images(size)
    delivered = model.deliver(model.raw_pos_embed())
    features, maps = model.forward_intermediates(batch)
    for index, image in enumerate(batch):
        expected = ref_swin(weights, method, image, size)
        places = [*delivered.per_layer, delivered.last]
        for got, value in zip(places, [*expected["received"], expected["last"]], strict=True):
            assert (got is None) == (value is None)
            if value is not None:
                assert_close(got[0], value)
        for got, value in zip(maps, expected["maps"], strict=True):
            assert_close(got[index], value)
        assert_close(features[index], expected["features"])
        assert_close(model.forward_head(features, pre_logits=True)[index], expected["pooled"])
        assert_close(model(batch)[index], expected["logits"])
    assert torch.equal(model.forward_features(batch), features)


FIELDS: dict[str, list[Any]] = {"input_pe": [True], "first_layer": [None], "hierarchical": [True], "last_index": [None]}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_the_plain_loop_tells_methods_apart(field: str, value: Any) -> None:
    """No field of a method is lost in the small network: a reference with another value is far away."""
    own = replace(OWN, last_index=0)
    model, weights = network(own)
    batch = images(count=1)
    assert_close(model(batch), reference(weights, own, batch))
    assert (model(batch) - reference(weights, replace(own, **{field: value}), batch)).abs().max() > 1e-3


def test_default_and_lape_read_out_by_average_and_layer_0_is_always_served() -> None:
    specs = {name: create_model("swin_mini_patch2_28", name, device="meta").spec for name in WITH_OWN if name != "own"}
    assert {spec.pool for spec in specs.values()} == {"avg"}
    assert {spec.first_layer for spec in specs.values()} == {None, 0}
    assert specs["default"] == METHODS["gap"]
    assert specs["lape"] == METHODS["lape_gap"]
    assert specs["mpvg"] == specs["mpvg_layer0"] == METHODS["mpvg_layer0"]
    model = create_model("swin_mini_patch2_28", "mpvg_layer0")
    model.load_state_dict(create_model("swin_mini_patch2_28", "mpvg").state_dict(), strict=True)


def test_parameters_of_the_delivery_have_the_names_that_checkpoints_rely_on() -> None:
    names = {name for name, _ in build("mpvg", SQUARE).named_parameters() if name.startswith("delivery.")}
    places = [f"{stage}.layer_norms.{block}" for stage in range(3) for block in range(2)] + ["2.last_norm"]
    assert names == {f"delivery.{place}.{kind}" for place in places for kind in ("weight", "bias")}


@pytest.mark.parametrize("part", ["norm.weight", "norm.bias", "reduction.weight"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_pe_crosses_stages_through_the_merging_of_the_tokens(stage: int, part: str) -> None:
    """Another weight there is another PE in every later layer and in the Last LN, and the same one before."""
    model, _ = network("mpvg")
    before = model.deliver(model.raw_pos_embed())
    with torch.no_grad():
        weight = model.get_parameter(f"layers.{stage}.downsample.{part}")
        weight += 0.3 * torch.randn_like(weight)
    after = model.deliver(model.raw_pos_embed())
    for layer, (one, other) in enumerate(zip(before.per_layer, after.per_layer, strict=True)):
        assert ((one - other).abs().max() > 1e-3) == (layer >= 2 * stage)
    assert (before.last - after.last).abs().max() > 1e-3


def test_pos_0_reaches_the_last_norm_past_every_other_norm_of_the_delivery() -> None:
    """Eq. (11): what the Last LN receives does not depend on any LN'_l, and what the layers receive not on LN'_last."""
    model, _ = network("mpvg")
    before = model.deliver(model.raw_pos_embed())
    with torch.no_grad():
        for name, parameter in model.delivery.named_parameters():
            if "layer_norms" in name:
                parameter += 1
    changed = model.deliver(model.raw_pos_embed())
    assert torch.equal(changed.last, before.last)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(before.per_layer, changed.per_layer, strict=True))


MERGED = {"gap": 0, "default": 0, "lape": 2, "pvg": 2, "gap_last0": 2, "mpvg": 4, "mpvg_flat": 2, "own": 2}


@pytest.mark.parametrize("method", MERGED)
def test_nothing_is_merged_that_no_later_stage_takes(method: str) -> None:
    """Two borders of stages; the chain and pos_0 where both go on, one of them, or none."""
    model, _ = network(WITH_OWN[method])
    calls: list[int] = []
    for stage in model.layers:
        stage.downsample.register_forward_hook(lambda *_: calls.append(1))
    model.deliver(model.raw_pos_embed())
    assert len(calls) == MERGED[method]


def test_the_head_can_be_replaced() -> None:
    model, weights = network("mpvg")
    batch = images()
    pooled = reference(weights, "mpvg", batch, "pooled")
    model.reset_classifier(3)
    assert_close(model.double()(batch), pooled @ model.head.fc.weight.T + model.head.fc.bias)
    model.reset_classifier(0)
    assert_close(model(batch), pooled)
    model.reset_classifier(0, "max")
    assert_close(model(batch), reference(weights, "mpvg", batch, "features").flatten(1, 2).amax(dim=1))


# ---- image sizes


@pytest.mark.parametrize(("size", "grid"), [((36, 24), (18, 12)), ((24, 24), (12, 12)), ((48, 36), (24, 18))])
@pytest.mark.parametrize("method", [WITH_OWN["lape"], WITH_OWN["mpvg"]], ids=["lape", "mpvg"])
def test_another_image_size_resamples_the_raw_pe_and_then_delivers_it(
    method: DeliverySpec, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """set_input_size and dynamic_img_size agree, with 18 x 12 patches after 12 x 18 too, where the counts are equal."""
    fixed, weights = network(method, WIDE)
    dynamic = build(method, WIDE, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict(), strict=True)
    batch = torch.randn(1, 3, *size, dtype=torch.float64)
    pos = ref_resampled(weights["absolute_pos_embed"][0], (12, 18), grid, 0)
    expected = reference(weights, method, batch, pos=pos, size=WIDE)
    assert_close(dynamic(batch), expected)
    fixed.set_input_size(size, window_size=3)
    assert_close(fixed(batch), expected)
    for one, other in zip(dynamic.forward_intermediates(batch)[1], fixed.forward_intermediates(batch)[1], strict=True):
        assert_close(one, other, 1e-12)
    usual = images(WIDE, count=1)
    assert_close(dynamic(usual), reference(weights, method, usual, size=WIDE))


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, in resampling a bias
def test_set_input_size_keeps_what_need_not_change() -> None:
    """A frozen PE stays frozen; timm's own scaling of the windows goes on; the same size leaves the parameter."""
    model, _ = network("mpvg", WIDE)
    before = model.pos_embed
    model.set_input_size((24, 36))
    assert model.pos_embed is before
    before.requires_grad_(False)
    model.set_input_size((48, 72))
    assert model.pos_embed.shape == (1, 24 * 36, DIM)
    assert not model.pos_embed.requires_grad
    assert {block.window_size for block in model.blocks} == {(6, 6)}
    assert model(torch.randn(1, 3, 48, 72, dtype=torch.float64)).shape == (1, CLASSES)
    model.set_input_size(patch_size=4)
    assert model.pos_embed.shape == (1, 12 * 18, DIM)
    assert model(torch.randn(1, 3, 48, 72, dtype=torch.float64)).shape == (1, CLASSES)


# ---- intermediate stages


@pytest.mark.parametrize("method", [WITH_OWN["lape"], WITH_OWN["mpvg"]], ids=["lape", "mpvg"])
def test_the_forms_in_which_intermediates_come(method: DeliverySpec) -> None:
    """timm's arguments mean what they mean in timm; the Last LN, and what it receives, is for the last stage."""
    model, weights = network(method)
    batch = images()
    expected = [ref_swin(weights, method, image)["maps"] for image in batch]
    features = model.forward_features(batch)
    final, maps = model.forward_intermediates(batch, [0, -1], norm=True)
    assert torch.equal(final, features)
    assert torch.equal(maps[1], features.permute(0, 3, 1, 2))
    assert all(m.is_contiguous() for m in maps)
    assert_close(maps[0], torch.stack([stages[0] for stages in expected]))

    only = model.forward_intermediates(batch, 2, intermediates_only=True)
    for stage, got in zip((1, 2), only, strict=True):
        assert_close(got, torch.stack([stages[stage] for stages in expected]))
    last, stopped = model.forward_intermediates(batch, [1], norm=True, stop_early=True)
    assert torch.equal(stopped[0], only[0])
    assert torch.equal(last.permute(0, 3, 1, 2), only[0])
    last, _ = model.forward_intermediates(batch, [2], stop_early=True)
    assert torch.equal(last, features)
    with pytest.raises(ValueError, match=r"output_fmt is 'NHWC'; allowed: 'NCHW'"):
        model.forward_intermediates(batch, output_fmt="NHWC")


def test_stop_early_stops() -> None:
    model, _ = network("mpvg")
    ran: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(images(), [0, 1], stop_early=True, intermediates_only=True)
    assert len(ran) == 4


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", [[0], [1, 2]], ids=str)
@pytest.mark.parametrize("method", [WITH_OWN["gap_last0"], WITH_OWN["mpvg"]], ids=["gap_last0", "mpvg"])
def test_a_pruned_network_keeps_its_intermediates(method: DeliverySpec, indices: list[int], norm: bool) -> None:
    """Pruning removes stages, head and the LN' they alone used, and changes no value that is left; folded or not."""
    model, _ = network(method)
    batch = images()
    expected = model.forward_intermediates(batch, indices, norm=norm, intermediates_only=True)
    folded = fold(model)
    for network_ in (model, folded):
        assert network_.prune_intermediate_layers(indices, prune_norm=not norm) == indices
        assert len(network_.layers) == indices[-1] + 1
        assert len(network_.blocks) == 2 * len(network_.layers)
    for network_ in (model, folded, fold(model)):
        maps = network_.forward_intermediates(batch, indices, norm=norm, intermediates_only=True)
        for one, other in zip(maps, expected, strict=True):
            assert_close(one, other)
        final = network_.forward_features(batch)
        if norm or indices[-1] < 2:
            assert_close(final.permute(0, 3, 1, 2), maps[-1])
    names = [name for name, _ in folded.delivery.named_buffers() if name.startswith("layer_")]
    assert len(names) == (0 if method.first_layer is None else len(model.blocks))
    assert len(model.delivery) == len(model.layers)

    maps = model.forward_intermediates(batch, indices, norm=norm, intermediates_only=True)
    sum((value * torch.randn_like(value)).sum() for value in maps).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused


@pytest.mark.parametrize(("name", "reductions"), [("swin_mini_patch2_28", [2, 4]), (TINY, [4, 8, 16, 32])])
def test_features_only_gives_every_stage_unless_asked_otherwise(name: str, reductions: list[int]) -> None:
    with torch.device("meta"):
        wrapped = timm.create_model(f"mpvg_{name}", features_only=True)
    assert wrapped.feature_info.reduction() == reductions


# ---- parameter groups


@pytest.mark.parametrize("method", [WITH_OWN["mpvg"]], ids=["mpvg"])
def test_layer_decay_puts_each_norm_beside_its_pair(method: DeliverySpec) -> None:
    """LN'_l learns at the rate of layer l, the Last LN's at that of the Last LN, and the PE at that of the patches."""
    model = build(method, SQUARE)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    groups: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in groups, "a parameter in two groups"
            groups[id(parameter)] = group
    named = dict(model.named_parameters())
    assert groups.keys() == {id(parameter) for parameter in named.values()}
    scale = {name: groups[id(parameter)]["lr_scale"] for name, parameter in named.items()}
    decay = {name: groups[id(parameter)]["weight_decay"] for name, parameter in named.items()}

    in_order = ["patch_embed.proj.weight"]
    in_order += [f"layers.{stage}.blocks.{block}.norm1.weight" for stage in range(3) for block in range(2)]
    in_order += ["head.fc.weight"]
    assert [scale[name] for name in in_order] == pytest.approx([0.75**k for k in reversed(range(len(in_order)))])
    for name in named:
        if name.startswith("delivery."):
            _, stage, kind, block, *_ = name.split(".")
            pair = "norm.weight" if kind == "last_norm" else f"layers.{stage}.blocks.{block}.norm1.weight"
            assert scale[name] == scale[pair] < scale["head.fc.weight"], name
            assert decay[name] == 0, name
    assert scale["norm.weight"] == scale[in_order[-2]]
    assert scale["pos_embed"] == scale["patch_embed.proj.weight"]
    assert scale["layers.1.downsample.reduction.weight"] == scale["layers.1.blocks.0.norm1.weight"]
    assert decay["pos_embed"] == decay["layers.0.blocks.0.attn.relative_position_bias_table"] == 0
    assert decay["layers.1.blocks.0.attn.qkv.weight"] == decay["layers.1.downsample.reduction.weight"] == 0.05


def test_coarse_groups_are_stages() -> None:
    """For timm's `group_parameters(coarse=True)`: a stage with its LN'; the Last LN and its own go with the head."""
    model = build("mpvg", SQUARE)
    by_name = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert by_name["pos_embed"] == by_name["patch_embed.proj.weight"] == 0
    for stage in range(3):
        assert by_name[f"layers.{stage}.blocks.1.norm1.weight"] == stage + 1
        assert by_name[f"delivery.{stage}.layer_norms.1.weight"] == stage + 1
    assert by_name["norm.weight"] == by_name["delivery.2.last_norm.weight"] == by_name["head.fc.weight"] == 4


# ---- folding


def computations(run: Callable[[Tensor], object], batch: Tensor) -> Counter[str]:
    """The operations that run, less those that only look at a tensor in another shape."""
    return Counter(str(operation.overloadpacket) for operation in executed(run, batch) if not operation.is_view)


@pytest.mark.parametrize("method", [WITH_OWN["gap_last0"], WITH_OWN["own"]], ids=["gap_last0", "own"])
def test_folded_equals_unfolded(method: DeliverySpec) -> None:
    """Logits, tokens, intermediates with and without the Last LN, and another head and read-out."""
    model, _ = network(method)
    batch, folded = images(), fold(model)
    assert_close(folded(batch), model(batch))
    assert_close(folded.forward_features(batch), model.forward_features(batch))
    for norm in (False, True):
        for one, other in zip(
            folded.forward_intermediates(batch, norm=norm)[1],
            model.forward_intermediates(batch, norm=norm)[1],
            strict=True,
        ):
            assert_close(one, other)
    assert not list(folded.delivery.parameters())
    for network_ in (folded, model):
        network_.reset_classifier(0, "max")
    assert_close(folded(batch), model(batch))


@every_kind
def test_a_folded_classifier_costs_gap_and_one_addition_a_layer(method: DeliverySpec) -> None:
    """Every operation is counted: beside the additions, a folded network runs what GAP runs."""
    batch = images()
    model, gap = network(method)[0], network("gap")[0]
    served = 0 if method.first_layer is None else len(model.blocks)
    plain, folded, baseline = (computations(net, batch) for net in (model, fold(model), gap))
    assert folded["aten.add"] == baseline["aten.add"] + served - (not method.input_pe)
    assert plain["aten.add"] == folded["aten.add"] + (method.last_index is not None)
    del folded["aten.add"], baseline["aten.add"]
    assert folded == baseline


# ---- checkpoints


def test_an_official_checkpoint_is_read(tmp_path: Path) -> None:
    """By its own names and with its buffers; what a method adds is new."""
    weights = official_weights(METHODS["gap"], SQUARE)
    save_file(weights, tmp_path / "swin.safetensors")
    model = build("mpvg", SQUARE)
    report = load_checkpoint(model, tmp_path / "swin.safetensors")
    assert report.source == "microsoft/Swin-Transformer"
    assert set(report.new) == {name for name in model.state_dict() if name.startswith("delivery.")}
    assert not report.dropped
    batch, gap = images(), build("gap", SQUARE)
    load_checkpoint(gap, tmp_path / "swin.safetensors")
    assert_close(gap(batch), reference(weights, "gap", batch))


def test_a_timm_checkpoint_is_not_mistaken_for_an_official_one(tmp_path: Path) -> None:
    """timm's names are ours; there and in the released networks only the PE is missing."""
    sizes = SQUARE | {"patch_size": PATCH, "embed_dim": DIM, "mlp_ratio": RATIO, "num_classes": CLASSES}
    theirs = SwinTransformer(**sizes).double().eval()
    translated, layout = translate(theirs.state_dict(), DeliveredSwinTransformer.layouts)
    assert layout is None
    assert translated.keys() == theirs.state_dict().keys()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    model: Any = build("default", SQUARE)
    pos = model.pos_embed.detach().clone()
    report = load_checkpoint(model, tmp_path / "timm.safetensors")
    assert report.new == {"pos_embed": "the file has none"}
    assert torch.equal(model.pos_embed, pos)
    with torch.no_grad():
        model.pos_embed.zero_()
    batch = images()
    assert_close(model(batch), theirs(batch))


# ---- refusals


NAME = "swin_mini_patch2_28"


def test_every_layer_is_a_block_that_takes_a_pe() -> None:
    model: Any = create_model(TINY, device="meta")
    assert len(model.blocks) == 12
    assert {type(block) for block in model.blocks} == {DeliveredSwinBlock}
    assert [block.norm1.weight.shape[0] for block in model.blocks] == [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_model(NAME, "pvg_token"), r"Swin cannot read out by 'token': it has avg; use .* pool='avg'"),
        (lambda: create_model(TINY, "mpvg_last5", device="meta"), r"pos_5 is not as wide as the Last LN; use 0"),
        (lambda: create_model(NAME, "mpvg_last5"), r"last_index 5 asks for pos_5, but Swin has 4 layers"),
        (lambda: create_model(NAME, global_pool="max"), r"global_pool='max': the method decides it.*leave it out"),
        (lambda: create_model(NAME, img_size=29), r"image size 29 is not divisible by .* 2; .*: 28, 30"),
        (lambda: create_model(NAME, img_size=(28, 31)), r"image size 31 is not divisible"),
        (lambda: create_model(NAME).set_input_size((28, 31)), r"image size 31 is not divisible .*: 30, 32"),
        (lambda: create_model(NAME).set_input_size(patch_size=3), r"image size 28 is not divisible by .* 3"),
        (lambda: create_model(NAME, pretrained=True), r"mpvg_swin_mini_patch2_28 has no pretrained weights"),
        (lambda: create_model(NAME, "mvpg"), r"unknown method 'mvpg'; did you mean mpvg"),
    ],
)
def test_what_cannot_be_built_is_refused(build: Callable[[], object], message: str) -> None:
    """With the value, what is allowed, and what to do."""
    with pytest.raises(ValueError, match=message):
        build()


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="Input height"):
        build("mpvg", SQUARE)(images(WIDE | {"img_size": (26, 24)}))


# ---- files


def test_files_of_the_original_repository_start_networks(tmp_path: Path) -> None:
    """With and without the absolute PE, which the released networks have not."""
    path, weights = tmp_path / "swin.pth", official_weights(as_spec("default"), SQUARE)
    torch.save({"model": weights}, path)
    sizes = SQUARE | {"patch_size": PATCH, "embed_dim": DIM, "mlp_ratio": RATIO, "num_classes": CLASSES}
    arguments: dict[str, Any] = {"checkpoint_path": path, "dtype": torch.float64, **sizes}
    model = create_model("swin_tiny_patch4_window7_224", "default", **arguments).eval()
    expected, _ = network("default")
    translated, _ = translate(weights, DeliveredSwinTransformer.layouts)
    expected.load_state_dict(translated)
    batch = torch.randn(2, 3, *SQUARE["img_size"], dtype=torch.float64)
    assert_close(model(batch), expected(batch))

    del weights["absolute_pos_embed"]
    torch.save({"model": weights}, path)
    report = load_checkpoint(model, path)
    assert (report.source, report.new) == ("microsoft/Swin-Transformer", {"pos_embed": "the file has none"})
    assert not report.dropped
