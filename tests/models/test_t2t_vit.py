"""T2T-ViT with a delivered PE, against a plain loop over the repository's network with the repository's names."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, Method, NetworkTraits, resolve
from mpvg.models import create_model, load_checkpoint
from mpvg.models.checkpoints import translate
from mpvg.models.fold import fold
from mpvg.models.network import count_parameters
from mpvg.models.t2t_vit import T2TViT, TokenPerformer, TokensToToken
from reference import (
    assert_close,
    ref_attention,
    ref_delivered,
    ref_linear,
    ref_mlp,
    ref_norm,
    ref_resampled,
    windows,
)
from small_networks import accepted

NAME = "t2t_vit_7"
DEPTH, DIM, HEADS, TOKEN, FEATURES, EPS = 7, 12, 3, 64, 32, 1e-5
IMAGE, GRID = (32, 48), (2, 3)  # an image that is not square tells rows from columns
SIZES: dict[str, Any] = {"img_size": IMAGE, "embed_dim": DIM, "num_heads": HEADS, "num_classes": 5}


METHODS_HERE = accepted(DEPTH)
every_method = pytest.mark.parametrize("method", METHODS_HERE.values(), ids=METHODS_HERE.keys())


def images(size: tuple[int, int] = IMAGE) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64)


# ---- the reference, with weights under the repository's names


def official_shapes(spec: DeliverySpec, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of the repository holds, and beside it the LN' of a method."""
    token = spec.pool == "token"
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, math.prod(GRID) + token, DIM)}
    if token:
        shapes["cls_token"] = (1, 1, DIM)
    norms, linears = {"norm": DIM}, {"head": (5, DIM), "tokens_to_token.project": (DIM, 9 * TOKEN)}
    for name, width in [("attention1", 49 * channels), ("attention2", 9 * TOKEN)]:
        performer = f"tokens_to_token.{name}"
        shapes[f"{performer}.w"] = (FEATURES, TOKEN)
        norms |= {f"{performer}.norm1": width, f"{performer}.norm2": TOKEN}
        linears[f"{performer}.kqv"] = (3 * TOKEN, width)
        linears |= {f"{performer}.{part}": (TOKEN, TOKEN) for part in ("proj", "mlp.0", "mlp.2")}
    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        norms |= {f"{block}.norm1": DIM, f"{block}.norm2": DIM}
        shapes[f"{block}.attn.qkv.weight"] = (3 * DIM, DIM)
        linears |= {f"{block}.attn.proj": (DIM, DIM), f"{block}.mlp.fc1": (2 * DIM, DIM)}
        linears[f"{block}.mlp.fc2"] = (DIM, 2 * DIM)
        if spec.first_layer is not None and layer >= spec.first_layer:
            norms[f"delivery.layer_norms.{layer}"] = DIM
    if spec.last_index is not None:
        norms["delivery.last_norm"] = DIM
    for norm, width in norms.items():
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for linear, (out, into) in linears.items():
        shapes |= {f"{linear}.weight": (out, into), f"{linear}.bias": (out,)}
    return shapes


def official_weights(spec: DeliverySpec, channels: int = 3) -> dict[str, Tensor]:
    """Random weights, none where it starts."""
    weights = {}
    for name, shape in official_shapes(spec, channels).items():
        value = torch.randn(shape, dtype=torch.float64)
        if "norm" in name:
            weights[name] = 0.3 * value + name.endswith("weight")
        elif name.startswith("tokens_to_token") and not name.endswith(".w"):
            weights[name] = value / math.sqrt(shape[-1]) * (0.3 if "kqv" in name else 1)
        else:
            weights[name] = 0.3 * value
    return weights


def loaded(method: Method, weights: dict[str, Tensor], **kwargs: Any) -> nn.Module:
    model = create_model(NAME, method, **(SIZES | kwargs)).double().eval()
    renamed, layout = translate(weights, T2TViT.layouts)
    assert layout is not None
    assert layout.source == "yitu-opensource/T2T-ViT"
    model.load_state_dict(renamed, strict=True)
    return model


def small(method: Method, **kwargs: Any) -> nn.Module:
    """A network of seven narrow layers in float64, in which no parameter is where it starts."""
    weights = official_weights(resolve(method, NetworkTraits(name="", depth=DEPTH)), kwargs.get("in_chans", 3))
    return loaded(method, weights, **kwargs)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def ref_soft_split(image: Tensor, window: int, stride: int, padding: int) -> Tensor:
    """A map `(C, H, W)` as overlapping patches `(N, C * window * window)`, cut out of a frame of zeros."""
    found, _, _ = windows(image, window, stride, padding)
    return torch.stack([patch.flatten() for patch in found])


def ref_performer(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    k, q, v = ref_linear(ref_norm(x, weights, f"{name}.norm1", EPS), weights, f"{name}.kqv").split(TOKEN, dim=1)
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)  # of tokens t and s
    for direction in weights[f"{name}.w"]:
        phi_q = torch.exp(q @ direction - (q**2).sum(dim=1) / 2) / math.sqrt(FEATURES)
        phi_k = torch.exp(k @ direction - (k**2).sum(dim=1) / 2) / math.sqrt(FEATURES)
        kernel += phi_q[:, None] * phi_k[None, :]
    y = torch.stack([(row[:, None] * v).sum(dim=0) / (row.sum() + 1e-8) for row in kernel])
    x = v + ref_linear(y, weights, f"{name}.proj")
    return x + ref_mlp(ref_norm(x, weights, f"{name}.norm2", EPS), weights, f"{name}.mlp.0", f"{name}.mlp.2")


def ref_tokens(image: Tensor, weights: dict[str, Tensor]) -> Tensor:
    height, width = image.shape[1:]
    x = ref_performer(ref_soft_split(image, 7, 4, 2), weights, "tokens_to_token.attention1")
    x = ref_soft_split(x.T.reshape(TOKEN, height // 4, width // 4), 3, 2, 1)
    x = ref_performer(x, weights, "tokens_to_token.attention2")
    x = ref_soft_split(x.T.reshape(TOKEN, height // 8, width // 8), 3, 2, 1)
    return ref_linear(x, weights, "tokens_to_token.project")


def ref_t2t_vit(weights: dict[str, Tensor], spec: DeliverySpec, image: Tensor) -> dict[str, Any]:
    x = ref_tokens(image, weights)
    if spec.pool == "token":
        x = torch.cat([weights["cls_token"][0], x])
    pos = weights["pos_embed"][0]
    per_layer, last = ref_delivered(spec, weights, pos, DEPTH, EPS)
    if spec.input_pe:
        x = x + pos
    layers = []
    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        attended = ref_norm(x, weights, f"{name}.norm1", EPS) + per_layer[layer]
        q, k, v = (attended @ weights[f"{name}.attn.qkv.weight"].T).split(DIM, dim=1)
        x = x + ref_linear(ref_attention(q, k, v, HEADS), weights, f"{name}.attn.proj")
        x = x + ref_mlp(ref_norm(x, weights, f"{name}.norm2", EPS), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
        layers.append(x)
    features = ref_norm(x, weights, "norm", EPS) + last
    pooled = features[0] if spec.pool == "token" else features.mean(dim=0)
    return {"layers": layers, "features": features, "logits": ref_linear(pooled, weights, "head")}


def ref_sinusoid(rows: int, dim: int) -> Tensor:
    table = torch.zeros(rows, dim, dtype=torch.float64)
    for row in range(rows):
        for j in range(dim):
            angle = row / 10000 ** (2 * (j // 2) / dim)
            table[row, j] = math.cos(angle) if j % 2 else math.sin(angle)
    return table


# ---- sizes and start


COUNTS = {
    1000: {"default": 4_310_222, "lape": 4_313_806, "pvg": 4_312_782, "mpvg": 4_313_294},
    100: {"default": 4_078_922, "lape": 4_082_506, "pvg": 4_081_482, "mpvg": 4_081_994},
}


@pytest.mark.parametrize(
    ("classes", "method", "count"),
    [(classes, method, count) for classes, counts in COUNTS.items() for method, count in counts.items()],
)
def test_parameters_are_as_many_as_in_the_paper(classes: int, method: str, count: int) -> None:
    """Tables 1 and 2, which count the frozen ones, too."""
    with torch.device("meta"):
        model = create_model(NAME, method, num_classes=classes)
    assert count_parameters(model) == count


@pytest.mark.parametrize(
    ("name", "depth", "dim", "hidden"),
    [(NAME, 7, 256, 512), ("t2t_vit_10", 10, 256, 512), ("t2t_vit_12", 12, 256, 512), ("t2t_vit_14", 14, 384, 1152)],
)
def test_every_member_at_its_own_size(name: str, depth: int, dim: int, hidden: int) -> None:
    with torch.device("meta"):
        model = create_model(name, "mpvg", num_classes=7)
        assert model(torch.randn(2, *model.pretrained_cfg["input_size"])).shape == (2, 7)
    assert model.pos_embed.shape == (1, 196, dim)
    assert len(model.blocks) == depth
    assert {block.mlp.fc1.out_features for block in model.blocks} == {hidden}
    assert {block.attn.head_dim for block in model.blocks} == {64}
    assert model.pretrained_cfg["crop_pct"] == 0.9
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("restarted", [False, True])
def test_where_the_weights_start(restarted: bool) -> None:
    """Every Linear at 0.02, those that make the tokens included; biases at zero; the features' rows orthogonal."""
    model = create_model(NAME, "default", depth=2)
    if restarted:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(3.0)
        model.init_weights()
    assert 0.017 < model.cls_token.std() < 0.023
    assert_close(model.pos_embed[0].double(), ref_sinusoid(197, 256), 1e-6)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert 0.018 < module.weight.std() < 0.022, name
            assert module.bias is None or not module.bias.any(), name
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {EPS}
    drawn = [model.patch_embed.attention1.w, model.patch_embed.attention2.w]
    for w in drawn:
        assert_close(w @ w.T, FEATURES * torch.eye(FEATURES), 1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1


@pytest.mark.parametrize("dim", [12, 15])
def test_the_position_embedding_is_a_sinusoid_with_the_same_rows_for_patches(dim: int) -> None:
    """Row 0 is the class token's; without class token, or without a row for it, a patch keeps its row."""
    sizes = {"img_size": IMAGE, "embed_dim": dim, "num_heads": 3}
    table = ref_sinusoid(7, dim)
    options: list[tuple[str, dict[str, Any], int]] = [
        ("default", {}, 0),
        ("lape", {}, 0),
        ("gap", {}, 1),
        ("mpvg", {}, 1),
        ("default", {"no_embed_class": True}, 1),
        ("mpvg", {"no_embed_class": True, "reg_tokens": 2}, 1),
    ]
    for method, more, first in options:
        model = create_model(NAME, method, **sizes, **more, dtype=torch.float64)
        assert_close(model.pos_embed[0], table[first:], 1e-12)


@pytest.mark.parametrize("method", [METHODS["default"], METHODS["mpvg"]], ids=["default", "mpvg"])
def test_the_sinusoid_and_the_features_are_constants(method: DeliverySpec) -> None:
    """They are saved and loaded, and no optimizer gets them; all else learns."""
    model = create_model(NAME, method, **SIZES)
    frozen = {name for name, _ in model.named_buffers()}
    assert frozen == {"pos_embed", "patch_embed.attention1.w", "patch_embed.attention2.w"}
    assert frozen <= model.state_dict().keys()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.03)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- values


def test_an_official_checkpoint_gives_the_official_answers() -> None:
    """Every name of the repository finds its place, and no place is left over."""
    weights, batch = official_weights(METHODS["default"]), images()
    model = loaded("default", weights)
    expected = torch.stack([ref_t2t_vit(weights, METHODS["default"], image)["logits"] for image in batch])
    assert_close(model(batch), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_are_made_as_in_the_repository(channels: int) -> None:
    weights = official_weights(METHODS["gap"], channels)
    batch = torch.randn(2, channels, *IMAGE, dtype=torch.float64)
    model = loaded("gap", weights, in_chans=channels)
    tokens = model.patch_embed(batch)
    assert_close(tokens, torch.stack([ref_tokens(image, weights) for image in batch]))
    assert tokens.std() > 0.1
    as_map = loaded("gap", weights, in_chans=channels, dynamic_img_size=True).patch_embed(batch)
    assert_close(as_map, tokens.reshape(2, *GRID, DIM))


def test_where_no_feature_responds_the_performer_gives_nothing() -> None:
    """Long queries and keys leave sums far below 1e-8, which keeps the quotient from being a mean of v or 0 / 0."""
    weights = {name: 9 * value if "kqv" in name else value for name, value in official_weights(METHODS["gap"]).items()}
    x = torch.randn(5, 147, dtype=torch.float64)
    performer, attended = loaded("gap", weights).patch_embed.attention1, []
    performer.proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    assert_close(performer(x[None])[0], ref_performer(x, weights, "tokens_to_token.attention1"))
    assert attended[0].abs().max() < 1e-6


def test_the_features_are_computed_in_full_precision_under_autocast() -> None:
    """phi reaches exp(16), about 9e6; half precision ends at 65504."""
    performer = TokenPerformer(8, TOKEN)
    x = torch.stack([performer.w[0], performer.w[1]])[None].detach()
    expected = performer._attend(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(performer._attend(x, x, x), expected)
    half = performer._attend(*[x.half()] * 3)
    assert half.dtype == torch.float16
    assert half.isfinite().all()
    assert_close(half.float(), expected, 2e-2)


def test_a_network_in_half_precision_runs() -> None:
    model = create_model(NAME, "mpvg", **SIZES).eval()
    batch = torch.randn(1, 3, *IMAGE)
    expected = model(batch)
    assert_close(model.bfloat16()(batch.bfloat16()).float(), expected, 0.1 * expected.abs().max().item())


@every_method
def test_the_network_equals_the_plain_loop(method: DeliverySpec) -> None:
    """Tokens after every layer, tokens behind the Last LN, and logits."""
    weights, batch = official_weights(method), images()
    model = loaded(method, weights)
    features, layers = model.forward_intermediates(batch, output_fmt="NLC")
    count = model.num_prefix_tokens
    assert count == (method.pool == "token")
    logits = model(batch)
    for index, image in enumerate(batch):
        expected = ref_t2t_vit(weights, method, image)
        for layer, tokens in enumerate(expected["layers"]):
            assert_close(layers[layer][index], tokens[count:])
        assert_close(features[index], expected["features"])
        assert_close(logits[index], expected["logits"])


# ---- training


@pytest.mark.parametrize("performer", ["attention1", "attention2"])
@pytest.mark.parametrize("place", ["dp", "mlp.3"])
def test_each_performer_drops_out_in_training_in_two_places(performer: str, place: str) -> None:
    """A tenth in each, whatever the network's own dropout is; in evaluation nothing."""
    model, batch = small("mpvg"), images()
    module: Any = model.patch_embed.get_submodule(f"{performer}.{place}")
    assert module.p == 0.1
    assert torch.equal(model(batch), model(batch))
    without_dropout(model).train()
    assert torch.equal(model(batch), model(batch))
    module.p = 0.1
    assert (model(batch) - model(batch)).abs().max() > 1e-6


def test_dropout_comes_before_the_residual_is_added() -> None:
    """With everything dropped, v is left."""
    performer: Any = TokenPerformer(8, TOKEN).train()
    performer.dp.p = performer.mlp[3].p = 1.0
    x = torch.randn(2, 5, 8)
    assert torch.equal(performer(x), performer.kqv(performer.norm1(x))[..., 2 * TOKEN :])


# ---- intermediate layers, other sizes


@pytest.mark.parametrize("method", [METHODS["default"], METHODS["mpvg"]], ids=["default", "mpvg"])
def test_another_image_size(method: DeliverySpec) -> None:
    """set_input_size and dynamic_img_size agree: the table is resampled, stays frozen, and is delivered then."""
    weights, batch = official_weights(method), images((48, 32))
    fixed, dynamic = loaded(method, weights), loaded(method, weights, dynamic_img_size=True)
    fixed.set_input_size((48, 32))
    weights["pos_embed"] = ref_resampled(weights["pos_embed"][0], GRID, (3, 2), fixed.num_prefix_tokens)[None]
    assert_close(fixed.pos_embed, weights["pos_embed"])
    assert not fixed.pos_embed.requires_grad
    assert fixed.patch_embed.grid_size == (3, 2)
    assert_close(dynamic(batch), fixed(batch), 1e-12)
    assert_close(fixed(batch)[0], ref_t2t_vit(weights, method, batch[0])["logits"])
    assert fixed.forward_intermediates(batch)[1][0].shape == (2, DIM, 3, 2)


def test_a_network_built_at_another_size_computes_its_table_anew() -> None:
    """Which is not the resampled one: there a row stands for a place in the image, here for a number in a line."""
    built = create_model(NAME, "mpvg", **(SIZES | {"img_size": (64, 32)}), dtype=torch.float64)
    assert_close(built.pos_embed[0], ref_sinusoid(9, DIM)[1:], 1e-12)
    resized = create_model(NAME, "mpvg", **SIZES, dtype=torch.float64)
    resized.set_input_size((64, 32))
    assert (built.pos_embed - resized.pos_embed).abs().max() > 0.1


# ---- folding


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mpvg_last8"}, r"last_index 8 asks for pos_8, but T2T-ViT has 7 layers"),
        ({"pos_std": 1.0}, r"pos_std=1.0: T2T-ViT's PE is a frozen sinusoid with a fixed scale; leave pos_std out"),
        ({"img_size": 40}, r"image size 40 is not divisible by the patch size 16; .*: 32, 48"),
        ({"patch_size": 8}, r"patch_size=8: the soft splits of T2T-ViT make patches of 16"),
        ({"embed_layer": TokensToToken}, r"embed_layer=.*: T2T-ViT makes its tokens by soft splits"),
        ({"embed_norm_layer": "layernorm"}, r"embed_norm_layer='layernorm': T2T-ViT makes its tokens by soft splits"),
        ({"dynamic_img_pad": True}, r"dynamic_img_pad=True: T2T-ViT makes its tokens by soft splits"),
        ({"reg_tokens": 2}, r"reg_tokens=2: the sinusoid has no row for a register; give no_embed_class=True"),
        ({"pos_embed": "none"}, r"pos_embed='none' leaves no position embedding to deliver"),
        ({"pretrained": True}, r"mpvg_t2t_vit_7 has no pretrained weights"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(NAME, **options)


def test_images_and_patches_of_another_size_are_refused() -> None:
    model = small("mpvg")
    with pytest.raises(ValueError, match=r"images are 48 x 32, but the network takes 32 x 48; call set_input_size"):
        model(images((48, 32)))
    with pytest.raises(ValueError, match=r"patch_size=8: the soft splits"):
        model.set_input_size(patch_size=8)
    model.set_input_size(patch_size=16)
    with pytest.raises(ValueError, match=r"image size 40 is not divisible by the patch size 16"):
        small("mpvg", dynamic_img_size=True)(images((32, 40)))
    assert model.patch_embed.feat_ratio() == 16
    assert model.patch_embed.feat_ratio(as_scalar=False) == (16, 16)
    with pytest.raises(RuntimeError, match=r"constants of one image size"):
        fold(model).set_input_size((48, 32))


# ---- files


def test_files_of_the_original_repository_start_networks(tmp_path: Path) -> None:
    """The averaged weights are those that its own loader takes. Without class token what was of it is dropped."""
    path, batch, weights = tmp_path / "official.pth", images(), official_weights(METHODS["default"])
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save(
        {"state_dict": other, "state_dict_ema": {f"module.{name}": value for name, value in weights.items()}}, path
    )
    named = f"{path}::grid=2x3"
    arguments: dict[str, Any] = {"checkpoint_path": named, "dtype": torch.float64, **SIZES}
    model = create_model(NAME, "default", **arguments).eval()
    assert_close(model(batch), torch.stack([ref_t2t_vit(weights, METHODS["default"], i)["logits"] for i in batch]))

    model = create_model(NAME, "gap", **arguments).eval()
    token, rows = "cls_token", "pos_embed"
    rest = {name: value[:, 1:] if name == rows else value for name, value in weights.items() if name != token}
    assert_close(model(batch), torch.stack([ref_t2t_vit(rest, METHODS["gap"], i)["logits"] for i in batch]))
    report = load_checkpoint(model, named)
    assert (report.source, set(report.dropped)) == ("yitu-opensource/T2T-ViT", {"cls_token", "pos_embed[:, :1]"})
