"""ViT and DeiT with a delivered PE, against a plain loop written from Eqs. (1)-(11), and against timm."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mpvg.models.vision_transformer
from mpvg.delivery import METHODS, DeliverySpec, Method, as_spec, describe
from mpvg.models import create_model, model_names
from reference import (
    assert_close,
    ref_attention,
    ref_delivered,
    ref_linear,
    ref_mlp,
    ref_norm,
    ref_patches,
    ref_resampled,
)

OWN = DeliverySpec(pool="token", first_layer=0, hierarchical=False, last_index=3)
"""A researcher's own method, which has no name."""
WITH_OWN = {**METHODS, "own": OWN}
every_method = pytest.mark.parametrize("method", WITH_OWN.values(), ids=WITH_OWN.keys())
# One of each kind: nothing delivered, layers only, Last LN only, both; class token and mean; pos_0 and a later pos_k.
KINDS = ["default", "lape", "pvg", "gap_last0", "mpvg", "mpvg_last5", "mpvg_no_input_pe", "own"]
every_kind = pytest.mark.parametrize("method", [WITH_OWN[name] for name in KINDS], ids=KINDS)

DEPTH, DIM, HEADS, PATCH, EPS = 12, 12, 3, 4, 1e-6
IMAGE, GRID = (8, 12), (2, 3)  # an image that is not square tells rows from columns


def small_vit(method: Method, **kwargs: Any) -> nn.Module:
    """A network of 12 narrow layers in float64, in which no parameter is where it starts."""
    sizes = {"img_size": IMAGE, "embed_dim": DIM, "num_heads": HEADS, "depth": DEPTH, "num_classes": 5, "mlp_ratio": 2}
    model = create_model("vit_narrow_patch4_28", method, **(sizes | kwargs)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def images(size: tuple[int, int] = IMAGE, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64)


# ---- the reference


def ref_vit(
    weights: dict[str, Tensor],
    spec: DeliverySpec,
    image: Tensor,
    *,
    pos: Tensor | None = None,
    kept: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, Any]:
    """Runs one image.

    Args:
        weights: the network's state_dict.
        spec: the method.
        image: `(C, H, W)`.
        pos: the raw PE, `(rows, D)`; None: the network's own.
        kept: the patches that patch dropout left, in their new order; None: all.
        mask: what is added to the attention scores, `(N, N)`.
    """
    pos = weights["pos_embed"][0] if pos is None else pos
    prefix = [weights[name][0] for name in ("cls_token", "reg_token") if name in weights]
    x = torch.cat([*prefix, ref_patches(image, weights, "patch_embed.proj", PATCH)])
    count = sum(len(tokens) for tokens in prefix)
    bare = len(x) - len(pos)  # leading tokens that have no row in the PE
    tokens = list(range(count)) + [count + int(i) for i in (range(len(x) - count) if kept is None else kept)]

    def over_tokens(rows: Tensor) -> Tensor:
        """What every token that takes part gets: its own row, or zeros where it has none."""
        zeros = torch.zeros(DIM, dtype=torch.float64)
        return torch.stack([zeros if token < bare else rows[token - bare] for token in tokens])

    per_layer, last = ref_delivered(spec, weights, pos, DEPTH, EPS)
    x = x[tokens]
    if spec.input_pe:
        x = x + over_tokens(pos)
    layers = []
    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        attended = ref_norm(x, weights, f"{name}.norm1", EPS) + over_tokens(per_layer[layer])
        q, k, v = ref_linear(attended, weights, f"{name}.attn.qkv").split(DIM, dim=1)
        x = x + ref_linear(ref_attention(q, k, v, HEADS, mask), weights, f"{name}.attn.proj")
        x = x + ref_mlp(ref_norm(x, weights, f"{name}.norm2", EPS), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
        layers.append(x)
    features = ref_norm(x, weights, "norm", EPS) + over_tokens(last)
    pooled = features[0] if spec.pool == "token" else features[count:].mean(dim=0)
    logits = ref_linear(pooled, weights, "head") if "head.weight" in weights else pooled
    return {"layers": layers, "last": over_tokens(last), "features": features, "pooled": pooled, "logits": logits}


def reference(model: nn.Module, method: Method, batch: Tensor, key: str = "logits", **kwargs: Any) -> Tensor:
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    return torch.stack([ref_vit(weights, as_spec(method), image, **kwargs)[key] for image in batch])


# ---- sizes and start


COUNTS = {
    "deit_tiny_patch16_224": {
        "default": 5_717_416,
        "gap": 5_717_032,
        "lape": 5_722_024,
        "lape_gap": 5_721_640,
        "pvg": 5_721_256,
        "pvg_token": 5_721_640,
        "mpvg": 5_721_640,
        "gap_last0": 5_717_416,
        "mpvg_last5": 5_721_640,
        "mpvg_last8": 5_721_640,
        "mpvg_last11": 5_721_640,
        "mpvg_layer0": 5_722_024,
        "mpvg_flat": 5_721_640,
        "mpvg_no_input_pe": 5_721_640,
    },
    "deit_small_patch16_224": {"default": 22_050_664, "lape": 22_059_880, "pvg": 22_058_344, "mpvg": 22_059_112},
    "deit_base_patch16_224": {"default": 86_567_656, "lape": 86_586_088, "pvg": 86_583_016, "mpvg": 86_584_552},
}


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [(name, method, count) for name, counts in COUNTS.items() for method, count in counts.items()],
)
def test_parameters_are_as_many_as_in_the_paper(name: str, method: str, count: int) -> None:
    """Table 1's networks at full size, to the last parameter."""
    with torch.device("meta"):
        model = create_model(name, method)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    "name", [name for name in model_names() if name.startswith(("deit", "vit_mini", "vit_narrow"))]
)
def test_every_member_runs_at_its_own_size(name: str) -> None:
    """Logits of the right shape; the members of our own, which are small, are really run."""
    with torch.device("meta") if name.startswith("deit") else torch.device("cpu"):
        model = create_model(name, "mpvg", num_classes=7).eval()
        size = model.pretrained_cfg["input_size"]
        assert model(torch.randn(1, *size)).shape == (1, 7)


def test_the_class_token_starts_at_std_002() -> None:
    """DeiT's 0.02, not current timm's 1e-6: over 768 values the estimate is within 15 %."""
    model = create_model("vit_narrow_patch4_28", "default", embed_dim=768, num_heads=3, depth=1)
    assert 0.017 < model.cls_token.std() < 0.023
    assert 0.017 < model.pos_embed.std() < 0.023


@pytest.mark.parametrize("method", ["mpvg", "lape"])
def test_pos_std_rescales_the_same_draw(method: str) -> None:
    """At std 1 the PE is exactly 50 times what it would be, and nothing else differs."""
    torch.manual_seed(3)
    plain = create_model("vit_mini_patch2_8", method, depth=1).state_dict()
    torch.manual_seed(3)
    scaled = create_model("vit_mini_patch2_8", method, depth=1, pos_std=1.0).state_dict()
    for key, value in plain.items():
        assert torch.equal(scaled[key], 50 * value if key == "pos_embed" else value), key


# ---- values


def test_default_equals_timms_deit() -> None:
    """With copied weights, which fit strictly in both directions, logits and tokens are timm's."""
    theirs = timm.create_model("deit_tiny_patch16_224").eval()
    ours = create_model("deit_tiny_patch16_224", "default").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        image = torch.randn(1, 3, 224, 224)
        expected = theirs(image)
        assert_close(ours(image), expected, 1e-5)
        theirs.load_state_dict(create_model("deit_tiny_patch16_224", "default").state_dict(), strict=True)
        assert (theirs(image) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.5, "qk_norm": True},
        {"pre_norm": True, "dynamic_img_size": True},
        {"reg_tokens": 2, "qkv_bias": False},
        {"reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True},
    ],
)
def test_default_equals_timm_under_timms_options(options: dict[str, Any]) -> None:
    """What a method does not decide stays timm's."""
    ours, batch = small_vit("default", **options), images()
    sizes = {"img_size": IMAGE, "embed_dim": DIM, "num_heads": HEADS, "depth": DEPTH, "num_classes": 5, "mlp_ratio": 2}
    theirs = VisionTransformer(patch_size=PATCH, **sizes, **options).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours(batch), theirs(batch))
    for one, other in zip(
        ours.get_intermediate_layers(batch, 3), theirs.get_intermediate_layers(batch, 3), strict=True
    ):
        assert_close(one, other)


@every_method
def test_the_network_equals_the_plain_loop(method: DeliverySpec) -> None:
    """Tokens after every layer, tokens behind the Last LN, what the head receives, and logits."""
    model, batch = small_vit(method), images()
    features, layers = model.forward_intermediates(batch, output_fmt="NLC")
    count = model.num_prefix_tokens
    weights = model.state_dict()
    for index, image in enumerate(batch):
        expected = ref_vit(weights, method, image)
        for layer, tokens in enumerate(expected["layers"]):
            assert_close(layers[layer][index], tokens[count:])
        assert_close(features[index], expected["features"])
    features = model.forward_features(batch)
    assert_close(features, reference(model, method, batch, "features"))
    assert_close(model.forward_head(features, pre_logits=True), reference(model, method, batch, "pooled"))
    assert_close(model(batch), reference(model, method, batch))


FIELDS: dict[str, list[Any]] = {
    "input_pe": [True],
    "first_layer": [None, 1],
    "hierarchical": [True],
    "last_index": [None, 0, 4],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_the_plain_loop_tells_methods_apart(field: str, value: Any) -> None:
    """No field of a method is lost in the small network: a reference with another value is far away."""
    own = replace(OWN, pool="avg", input_pe=False)
    model, batch = small_vit(own), images(count=1)
    assert_close(model(batch), reference(model, own, batch))
    other = replace(replace(own, last_index=0), **{field: value})  # last_index goes with every first_layer
    assert (model(batch) - reference(model, other, batch)).abs().max() > 1e-3


@every_method
def test_a_method_reaches_its_places_and_no_other(method: DeliverySpec) -> None:
    """Where `describe` says "-", a layer's attention takes LN_l(x_l) as it is, and the tokens carry no PE."""
    model = small_vit(method)
    with torch.no_grad():
        for parameter in [*model.patch_embed.parameters(), model.cls_token]:
            if parameter is not None:
                parameter.zero_()
    entered, attended = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        block.attn.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    model(images(count=1))
    places = dict(describe(method, DEPTH))

    assert torch.equal(entered[0], torch.zeros_like(entered[0]) if places["input"] == "-" else model.pos_embed)
    for layer, block in enumerate(model.blocks):
        received = attended[layer] - block.norm1(entered[layer])
        assert (received.abs().max() < 1e-9) == (places[f"layer {layer}"] == "-")


def test_the_last_norm_comes_first_then_the_pe_then_the_mean() -> None:
    """Eqs. (4), (11): not timm's order, which normalizes the mean."""
    model, batch = small_vit("mpvg"), images()
    x = model.forward_intermediates(batch, [DEPTH - 1], output_fmt="NLC", intermediates_only=True)[0]
    last = model.delivery(model.pos_embed).last
    pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert_close(pooled, (model.norm(x) + last).mean(dim=1))
    assert (pooled - (model.norm(x.mean(dim=1)) + last.mean(dim=1))).abs().max() > 1e-2
    assert (pooled - model.norm((x + last).mean(dim=1))).abs().max() > 1e-2


def test_an_attention_mask_passes_through() -> None:
    """On the way to the logits, to the tokens and to the intermediates, with and without checkpointing."""
    model, batch = small_vit("mpvg"), images()
    mask = torch.randn(6, 6, dtype=torch.float64)
    expected = reference(model, "mpvg", batch, mask=mask)
    assert (expected - model(batch)).abs().max() > 1e-3
    assert_close(model(batch, attn_mask=mask), expected)
    features = reference(model, "mpvg", batch, "features", mask=mask)
    assert_close(model.forward_features(batch, attn_mask=mask), features)
    assert_close(model.forward_intermediates(batch, attn_mask=mask)[0], features)
    model.set_grad_checkpointing()
    assert_close(model.train()(batch, attn_mask=mask), expected)

    causal = torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    assert_close(model.eval()(batch, is_causal=True), reference(model, "mpvg", batch, mask=causal))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.pool == "avg"])
def test_without_class_token_every_layer_gets_contiguous_tokens(method: str, dynamic: bool) -> None:
    """Otherwise every LayerNorm of the residual stream would copy them first."""
    model, seen = small_vit(method, dynamic_img_size=dynamic), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    model(images())
    assert seen == [True] * DEPTH


# ---- tokens beside the patches, and tokens that are left out


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("reg_tokens", [0, 2])
@every_kind
def test_registers_and_rows_of_their_own(method: DeliverySpec, reg_tokens: int, no_embed_class: bool) -> None:
    """A prefix token is delivered its own row, or nothing at any layer if the PE has none; the mean leaves it out."""
    model, batch = small_vit(method, reg_tokens=reg_tokens, no_embed_class=no_embed_class), images()
    prefix = reg_tokens + (method.pool == "token")
    assert model.pos_embed.shape[1] == 6 + (0 if no_embed_class else prefix)
    assert_close(model.forward_features(batch), reference(model, method, batch, "features"))
    assert_close(model(batch), reference(model, method, batch))

    if prefix:
        _, pairs = model.forward_intermediates(batch, return_prefix_tokens=True, output_fmt="NLC")
        layers = ref_vit(model.state_dict(), method, batch[0])["layers"]
        for (maps, tokens), expected in zip(pairs, layers, strict=True):
            assert_close(torch.cat([tokens[0], maps[0]]), expected)


@pytest.mark.parametrize("reg_tokens", [0, 2])
@every_kind
def test_kept_patches_get_their_own_rows(
    method: DeliverySpec, reg_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch dropout permutes: each kept token is delivered the row of the patch that it is, at every place."""
    recorded: list[Tensor] = []

    def recording(*args: Any) -> tuple[Tensor, Tensor | None]:
        x, kept = patch_dropout_forward(*args)
        recorded.append(kept)
        return x, kept

    monkeypatch.setattr(mpvg.models.vision_transformer, "patch_dropout_forward", recording)
    size = (12, 16)
    model = small_vit(method, patch_drop_rate=0.5, reg_tokens=reg_tokens, img_size=size).train()
    batch = images(size)
    features, logits = model.forward_features(batch), model(batch)
    assert len(recorded) == 2
    for kept in recorded:
        assert kept.shape == (2, 6)
        assert kept[0].tolist() != kept[1].tolist()
        assert all(row.tolist() != list(range(6)) for row in kept)
    for index in range(2):
        image = batch[index : index + 1]
        assert_close(features[index : index + 1], reference(model, method, image, "features", kept=recorded[0][index]))
        assert_close(logits[index : index + 1], reference(model, method, image, kept=recorded[1][index]))

    assert_close(model.eval()(batch), reference(model, method, batch))
    assert recorded[-1] is None


# ---- image sizes


@pytest.mark.parametrize(
    ("size", "grid", "reg_tokens"), [((16, 16), (4, 4), 0), ((12, 8), (3, 2), 1), ((8, 20), (2, 5), 0)]
)
@pytest.mark.parametrize("method", [METHODS["lape"], METHODS["mpvg"]], ids=["lape", "mpvg"])
def test_another_image_size_resamples_the_raw_pe_and_then_delivers_it(
    method: DeliverySpec, size: tuple[int, int], grid: tuple[int, int], reg_tokens: int
) -> None:
    """set_input_size and dynamic_img_size agree, with 3 x 2 patches after 2 x 3 too, where the counts are equal."""
    fixed = small_vit(method, reg_tokens=reg_tokens)
    dynamic = small_vit(method, reg_tokens=reg_tokens, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    pos = ref_resampled(fixed.pos_embed[0].detach(), GRID, grid, reg_tokens + (method.pool == "token"))
    batch = images(size, count=1)
    expected = reference(fixed, method, batch, pos=pos)

    assert_close(dynamic(batch), expected)
    fixed.set_input_size(size)
    assert_close(fixed(batch), expected)
    assert_close(dynamic(batch), fixed(batch), 1e-12)
    for one, other in zip(dynamic.forward_intermediates(batch)[1], fixed.forward_intermediates(batch)[1], strict=True):
        assert one.shape == (1, DIM, *grid)
        assert_close(one, other, 1e-12)


def test_resampling_what_is_delivered_would_be_something_else() -> None:
    """LN' of a resampled PE is not the resampled LN'(PE), so the order in the test above is tested by it."""
    weights, size = small_vit("mpvg").state_dict(), (4, 4)
    pos = weights["pos_embed"][0]
    pos_then = ref_resampled(pos, GRID, size, 0)
    per_layer, last = ref_delivered(METHODS["mpvg"], weights, pos, DEPTH, EPS)
    per_layer_then, last_then = ref_delivered(METHODS["mpvg"], weights, pos_then, DEPTH, EPS)
    for value, then in [(per_layer[1], per_layer_then[1]), (per_layer[11], per_layer_then[11]), (last, last_then)]:
        assert (ref_resampled(value, GRID, size, 0) - then).abs().max() > 1e-2


def test_set_input_size_takes_a_patch_size_alone() -> None:
    model = small_vit("mpvg")
    model.set_input_size(patch_size=2)
    assert model.pos_embed.shape == (1, 24, DIM)
    assert model(images()).shape == (2, 5)


# ---- intermediate layers


@every_kind
def test_normalized_intermediates_receive_what_the_last_norm_receives(method: DeliverySpec) -> None:
    """The last of them is forward_features; the others are its Last LN, PE included, on earlier tokens."""
    model, batch = small_vit(method), images()
    count = model.num_prefix_tokens
    final, maps = model.forward_intermediates(batch, norm=True, return_prefix_tokens=False)
    assert torch.equal(final, model.forward_features(batch))
    for index, image in enumerate(batch):
        weights = model.state_dict()
        expected = ref_vit(weights, method, image)
        for layer, tokens in enumerate(expected["layers"]):
            by_hand = (ref_norm(tokens, weights, "norm", EPS) + expected["last"])[count:]
            assert_close(maps[layer][index], by_hand.T.reshape(DIM, 2, 3))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), final[:, count:])


def test_the_forms_in_which_intermediates_come() -> None:
    """timm's arguments mean what they mean in timm."""
    model, batch = small_vit("pvg_token"), images()
    final, maps = model.forward_intermediates(batch, [2, -1])
    assert [m.shape for m in maps] == [(2, DIM, 2, 3)] * 2
    assert all(m.is_contiguous() for m in maps)
    assert torch.equal(final, model.forward_features(batch))

    only = model.forward_intermediates(batch, [2, -1], intermediates_only=True, output_fmt="NLC")
    assert isinstance(only, list)
    pairs = model.forward_intermediates(batch, [2, -1], return_prefix_tokens=True, intermediates_only=True)
    named = model.forward_intermediates(batch, [2, -1], return_prefix_tokens=True, output_dict=True)
    assert set(named) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    assert torch.equal(named["image_features"], final)
    for k, layer in enumerate([2, DEPTH - 1]):
        tokens = torch.stack([ref_vit(model.state_dict(), METHODS["pvg_token"], i)["layers"][layer] for i in batch])
        assert_close(only[k], tokens[:, 1:])
        assert torch.equal(pairs[k][0], maps[k])
        assert_close(pairs[k][1], tokens[:, :1])
        assert torch.equal(named["image_intermediates"][k], maps[k])
        assert torch.equal(named["image_intermediates_prefix"][k], pairs[k][1])
    assert set(model.forward_intermediates(batch, output_dict=True, intermediates_only=True)) == {"image_intermediates"}

    stopped = model.forward_intermediates(batch, [2], stop_early=True, intermediates_only=True)
    assert torch.equal(stopped[0], maps[0])
    with pytest.raises(ValueError, match=r"output_fmt is 'NHWC'; allowed: 'NCHW', 'NLC'"):
        model.forward_intermediates(batch, output_fmt="NHWC")


def test_stop_early_stops() -> None:
    model, ran = small_vit("mpvg"), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(images(), [1, 2], stop_early=True, intermediates_only=True)
    assert len(ran) == 3


# ---- head


def test_the_head_can_be_replaced() -> None:
    model, batch = small_vit("mpvg"), images()
    pooled = reference(model, "mpvg", batch, "pooled")
    model.reset_classifier(3)
    assert_close(model.double()(batch), pooled @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0)
    assert_close(model(batch), pooled)
    without = small_vit("mpvg", num_classes=0)
    assert not [name for name, _ in without.named_parameters() if name.startswith("head")]
    assert_close(without(batch), reference(without, "mpvg", batch, "pooled"))


# ---- parameter groups


# ---- the ways in


def through_timm(method: Method, **kwargs: Any) -> nn.Module:
    return timm.create_model("mpvg_vit_narrow_patch4_28", method=method, **kwargs)


def through_mpvg(method: Method, **kwargs: Any) -> nn.Module:
    return create_model("vit_narrow_patch4_28", method, **kwargs)


@pytest.mark.parametrize("create", [through_timm, through_mpvg])
@pytest.mark.parametrize("method", ["pvg", METHODS["pvg"], METHODS["pvg"].to_dict(), OWN, OWN.to_dict()])
def test_a_method_is_a_name_a_spec_or_its_fields(create: Callable[..., nn.Module], method: Method) -> None:
    model = create(method, num_classes=5, depth=5)
    assert model.delivery.spec == as_spec(method)
    assert model.eval()(torch.randn(1, 3, 28, 28)).shape == (1, 5)


def test_timms_factory_builds_deit_with_a_method() -> None:
    with torch.device("meta"):
        model = timm.create_model("mpvg_deit_tiny_patch16_224", method="pvg")
    assert model.delivery.spec == METHODS["pvg"]
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS["deit_tiny_patch16_224"]["pvg"]
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


def test_the_norms_follow_dtype_and_the_networks_eps() -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    depth = len(model.blocks)
    assert len(norms) == 2 * depth + 1 + (depth - 1) + 1
    assert {norm.eps for norm in norms} == {EPS}


NAME = "vit_mini_patch4_32"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_model(NAME, img_size=30), r"image size 30 is not divisible by .* 4; .*: 28, 32"),
        (lambda: create_model(NAME, img_size=(32, 2)), r"image size 2 is not divisible .*: 4, 8"),
        (lambda: create_model(NAME).set_input_size((32, 33)), r"image size 33 is not divisible .*: 32, 36"),
        (
            lambda: create_model(NAME).set_input_size(patch_size=5),
            r"image size 32 is not divisible by .* 5; .*: 30, 35",
        ),
        (lambda: create_model("diet_tiny"), r"unknown model 'diet_tiny'; did you mean .*deit_tiny_patch16_224"),
        (lambda: create_model("zzz"), r"unknown model 'zzz'\. Known: ceit_base"),
        (lambda: create_model(NAME, "mvpg"), r"unknown method 'mvpg'; did you mean mpvg"),
        (lambda: create_model(NAME, global_pool="token"), r"global_pool='token': the method decides it"),
        (lambda: create_model(NAME, class_token=True), r"class_token=True: the method decides it"),
        (lambda: create_model(NAME, fc_norm=True), r"fc_norm=True: the method decides it"),
        (lambda: create_model(NAME, block_fn=nn.Identity), r"block_fn=.*: the method decides it"),
        (lambda: create_model(NAME, "mpvg_last8"), r"last_index 8 asks for pos_8, but ViT has 6 layers"),
        (lambda: create_model(NAME, pretrained=True), r"mpvg_vit_mini_patch4_32 has no pretrained weights"),
        (lambda: create_model(NAME, pos_embed="none"), r"pos_embed='none' leaves no position embedding to deliver"),
        (lambda: create_model(NAME, final_norm=False), r"final_norm=False leaves no Last LN"),
        (lambda: create_model(NAME, pos_embed="", pos_std=1.0), r"pos_embed='' leaves no position embedding"),
    ],
)
def test_what_cannot_be_built_is_refused(build: Callable[[], object], message: str) -> None:
    """With the value, what is allowed, and what to do."""
    with pytest.raises(ValueError, match=message):
        build()
