"""ViT-Lite with a delivered PE, against a plain loop over the repository's layers with the repository's names."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, Method, NetworkTraits, resolve
from mpvg.models import create_model, load_checkpoint
from mpvg.models.checkpoints import translate
from mpvg.models.vit_lite import ViTLite
from reference import assert_close, ref_attention, ref_delivered, ref_linear, ref_mlp, ref_norm, ref_patches
from small_networks import accepted

NAME = "vit_lite_7_patch4_32"
DEPTH, DIM, HEADS, PATCH, EPS = 7, 12, 3, 4, 1e-5
IMAGE, GRID = (8, 12), (2, 3)  # an image that is not square tells rows from columns
SIZES: dict[str, Any] = {"img_size": IMAGE, "embed_dim": DIM, "num_heads": HEADS, "num_classes": 5}


METHODS_HERE = accepted(DEPTH)
every_method = pytest.mark.parametrize("method", METHODS_HERE.values(), ids=METHODS_HERE.keys())


def images(size: tuple[int, int] = IMAGE) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64)


# ---- the reference, with weights under the repository's names


def official_shapes(spec: DeliverySpec) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of the repository holds, and beside it the LN' of a method."""
    token = spec.pool == "token"
    shapes: dict[str, tuple[int, ...]] = {
        "tokenizer.conv_layers.0.0.weight": (DIM, 3, PATCH, PATCH),
        "tokenizer.conv_layers.0.0.bias": (DIM,),
        "classifier.positional_emb": (1, math.prod(GRID) + token, DIM),
        "classifier.fc.weight": (5, DIM),
        "classifier.fc.bias": (5,),
    }
    if token:
        shapes["classifier.class_emb"] = (1, 1, DIM)
    norms = ["classifier.norm"]
    for layer in range(DEPTH):
        block = f"classifier.blocks.{layer}"
        norms += [f"{block}.pre_norm", f"{block}.norm1"]
        shapes[f"{block}.self_attn.qkv.weight"] = (3 * DIM, DIM)
        for name, out, into in [("self_attn.proj", DIM, DIM), ("linear1", 2 * DIM, DIM), ("linear2", DIM, 2 * DIM)]:
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        if spec.first_layer is not None and layer >= spec.first_layer:
            norms.append(f"delivery.layer_norms.{layer}")
    if spec.last_index is not None:
        norms.append("delivery.last_norm")
    for norm in norms:
        shapes |= {f"{norm}.weight": (DIM,), f"{norm}.bias": (DIM,)}
    return shapes


def official_weights(spec: DeliverySpec) -> dict[str, Tensor]:
    """Random weights, none where it starts."""
    weights = {}
    for name, shape in official_shapes(spec).items():
        value = 0.3 * torch.randn(shape, dtype=torch.float64)
        weights[name] = 1 + value if "norm" in name and name.endswith("weight") else value
    return weights


def loaded(method: Method, weights: dict[str, Tensor], **kwargs: Any) -> nn.Module:
    model = create_model(NAME, method, **(SIZES | kwargs)).double().eval()
    renamed, layout = translate(weights, ViTLite.layouts)
    assert layout is not None
    assert layout.source == "SHI-Labs/Compact-Transformers"
    model.load_state_dict(renamed, strict=True)
    return model


def small(method: Method, **kwargs: Any) -> nn.Module:
    """A network of seven narrow layers in float64, in which no parameter is where it starts."""
    return loaded(method, official_weights(resolve(method, NetworkTraits(name="", depth=DEPTH))), **kwargs)


def ref_vit_lite(weights: dict[str, Tensor], spec: DeliverySpec, image: Tensor) -> dict[str, Any]:
    x = ref_patches(image, weights, "tokenizer.conv_layers.0.0", PATCH)
    if spec.pool == "token":
        x = torch.cat([weights["classifier.class_emb"][0], x])
    pos = weights["classifier.positional_emb"][0]
    per_layer, last = ref_delivered(spec, weights, pos, DEPTH, EPS)
    if spec.input_pe:
        x = x + pos
    layers = []
    for layer in range(DEPTH):
        name = f"classifier.blocks.{layer}"
        attended = ref_norm(x, weights, f"{name}.pre_norm", EPS) + per_layer[layer]
        q, k, v = (attended @ weights[f"{name}.self_attn.qkv.weight"].T).split(DIM, dim=1)
        x = x + ref_linear(ref_attention(q, k, v, HEADS), weights, f"{name}.self_attn.proj")
        u = ref_norm(x, weights, f"{name}.norm1", EPS)
        x = u + ref_mlp(u, weights, f"{name}.linear1", f"{name}.linear2")
        layers.append(x)
    features = ref_norm(x, weights, "classifier.norm", EPS) + last
    pooled = features[0] if spec.pool == "token" else features.mean(dim=0)
    return {"layers": layers, "features": features, "logits": ref_linear(pooled, weights, "classifier.fc")}


# ---- sizes and start


@pytest.mark.parametrize(
    ("method", "count"), [("default", 3_740_004), ("lape", 3_743_588), ("pvg", 3_742_564), ("mpvg", 3_743_076)]
)
def test_parameters_are_as_many_as_counted_by_hand(method: str, count: int) -> None:
    """Table 2's network for CIFAR-100."""
    with torch.device("meta"):
        model = create_model(NAME, method, num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("name", "depth"), [("vit_lite_6_patch4_32", 6), (NAME, 7)])
def test_every_member_runs_at_its_own_size(name: str, depth: int) -> None:
    model = create_model(name, "mpvg", num_classes=7).eval()
    assert len(model.blocks) == depth
    assert {(block.attn.num_heads, *block.mlp.fc1.weight.shape) for block in model.blocks} == {(4, 512, 256)}
    assert model(torch.randn(1, *model.pretrained_cfg["input_size"])).shape == (1, 7)
    assert model.pretrained_cfg["mean"] == (0.5071, 0.4867, 0.4408)
    assert model.pretrained_cfg["std"] == (0.2675, 0.2565, 0.2761)
    assert model.pretrained_cfg["crop_pct"] == 1.0


@pytest.mark.parametrize("restarted", [False, True])
def test_where_the_weights_start(restarted: bool) -> None:
    """PE at 0.2, class token at zero, patch kernel by Kaiming's rule for 48 inputs, every Linear at 0.02."""
    model = create_model(NAME, "default")
    if restarted:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(3.0)
        model.init_weights()
    assert 0.19 < model.pos_embed.std() < 0.21
    assert not model.cls_token.any()
    kernel = model.patch_embed.proj
    assert math.sqrt(2 / 48) == pytest.approx(kernel.weight.std().item(), rel=0.05)
    assert 0 < kernel.bias.abs().max() <= 1 / math.sqrt(48)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert 0.018 < module.weight.std() < 0.022, name
            assert module.bias is None or not module.bias.any()
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {EPS}


def test_pos_std_rescales_the_same_draw() -> None:
    torch.manual_seed(3)
    usual = create_model(NAME, "mpvg", depth=1).state_dict()
    torch.manual_seed(3)
    scaled = create_model(NAME, "mpvg", depth=1, pos_std=1.0).state_dict()
    for key, value in usual.items():
        torch.testing.assert_close(scaled[key], 5 * value if key == "pos_embed" else value, msg=key)


# ---- values


def test_an_official_checkpoint_gives_the_official_answers() -> None:
    """Every name of the repository finds its place, and no place is left over."""
    weights, batch = official_weights(METHODS["default"]), images()
    model = loaded("default", weights)
    expected = torch.stack([ref_vit_lite(weights, METHODS["default"], image)["logits"] for image in batch])
    assert_close(model(batch), expected)


def test_the_residual_stream_is_what_norm2_normalizes() -> None:
    """With timm's pre-norm layers the same weights give something else."""
    weights, image = official_weights(METHODS["default"]), images()
    model = loaded("default", weights)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    block = model.blocks[0]
    u = block.norm2(x + block.attn(block.norm1(x)))
    assert_close(block(x), u + block.mlp(u))
    theirs = timm.models.VisionTransformer(
        patch_size=PATCH, depth=DEPTH, mlp_ratio=2, qkv_bias=False, norm_layer=nn.LayerNorm, **SIZES
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert (theirs(image) - model(image)).abs().max() > 1e-2


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
        expected = ref_vit_lite(weights, method, image)
        for layer, tokens in enumerate(expected["layers"]):
            assert_close(layers[layer][index], tokens[count:])
        assert_close(features[index], expected["features"])
        assert_close(logits[index], expected["logits"])


# ---- training


def test_attention_weights_drop_out_in_training_at_a_tenth() -> None:
    """And nothing else does, unless it is asked for."""
    model, batch = small("mpvg"), images()
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert (model(batch) - model(batch)).abs().max() > 1e-6
    without = small("mpvg", attn_drop_rate=0.0).train()
    assert torch.equal(without(batch), without(batch))
    deeper = small("mpvg", attn_drop_rate=0.0, drop_path_rate=0.3)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in deeper.blocks]
    assert rates == pytest.approx([0.05 * layer for layer in range(DEPTH)])


# ---- intermediate layers, other sizes


@pytest.mark.parametrize("method", [METHODS["default"], METHODS["mpvg"]], ids=["default", "mpvg"])
def test_another_image_size(method: DeliverySpec) -> None:
    """set_input_size and dynamic_img_size agree, and deliver the resampled PE."""
    weights, batch = official_weights(method), images((16, 8))
    fixed, dynamic = loaded(method, weights), loaded(method, weights, dynamic_img_size=True)
    fixed.set_input_size((16, 8))
    assert fixed.pos_embed.shape == (1, 8 + fixed.num_prefix_tokens, DIM)
    assert_close(dynamic(batch), fixed(batch), 1e-12)
    weights["classifier.positional_emb"] = fixed.pos_embed.detach()
    assert_close(fixed(batch)[0], ref_vit_lite(weights, method, batch[0])["logits"])


# ---- folding


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mpvg_last8"}, r"last_index 8 asks for pos_8, but ViT-Lite has 7 layers"),
        ({"img_size": 30}, r"image size 30 is not divisible by the patch size 4; .*: 28, 32"),
        ({"pretrained": True}, r"mpvg_vit_lite_7_patch4_32 has no pretrained weights"),
        ({"block_fn": nn.Identity}, r"block_fn=.*: the method decides it"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(NAME, **options)


# ---- files


def test_files_of_the_original_repository_start_networks(tmp_path: Path) -> None:
    """It saves the weights by themselves. Without class token what was of it is dropped."""
    path, batch, weights = tmp_path / "official.pth", images(), official_weights(METHODS["default"])
    torch.save(weights, path)
    arguments: dict[str, Any] = {"checkpoint_path": f"{path}::grid=2x3", "dtype": torch.float64, **SIZES}
    model = create_model(NAME, "default", **arguments).eval()
    assert_close(model(batch), torch.stack([ref_vit_lite(weights, METHODS["default"], i)["logits"] for i in batch]))

    model = create_model(NAME, "gap", **arguments).eval()
    token, rows = "classifier.class_emb", "classifier.positional_emb"
    rest = {name: value[:, 1:] if name == rows else value for name, value in weights.items() if name != token}
    assert_close(model(batch), torch.stack([ref_vit_lite(rest, METHODS["gap"], i)["logits"] for i in batch]))
    report = load_checkpoint(model, f"{path}::grid=2x3")
    assert (report.source, set(report.dropped)) == ("SHI-Labs/Compact-Transformers", {"cls_token", "pos_embed[:, :1]"})
