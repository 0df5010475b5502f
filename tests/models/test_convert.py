"""timm's own networks with a delivered PE: unchanged where that is asked for, and by a plain loop where not."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mpvg
from mpvg.delivery import METHODS, DeliverySpec, as_spec
from mpvg.models import create_model
from mpvg.models.checkpoints import load_weights, read_tensors
from mpvg.models.convert import convert
from mpvg.models.fold import fold
from reference import assert_close, ref_resampled

NAMES = {
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_patch16_224",
    "deit3": "deit3_small_patch16_224",  # layer scale, a class token without a row in the PE
    "clip": "vit_base_patch32_clip_224",  # pre-norm
    "siglip": "vit_base_patch16_siglip_224",  # attention pooling
    "siglip_gap": "vit_base_patch16_siglip_gap_224",  # Last LN, then mean
    "gap": "vit_medium_patch16_gap_240",  # Last LN, then mean, no bias in qkv
    "reg_gap": "vit_medium_patch16_reg4_gap_256",  # registers; the mean, then an LN
    "dinov2": "vit_small_patch14_reg4_dinov2",  # registers and class token without rows, layer scale
    "hybrid": "vit_tiny_r_s16_p8_224",  # a convolutional stem
}
every_name = pytest.mark.parametrize("kind", NAMES)
LIKE = ["siglip", "dinov2", "deit"]


def theirs(kind: str, **kwargs: Any) -> nn.Module:
    """A small timm network of a kind, in float64, in which no parameter is where it starts."""
    patch = {"clip": 32, "dinov2": 14, "hybrid": 16}.get(kind, 16)
    small = {"img_size": (2 * patch, 3 * patch), "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    if kind == "hybrid":
        small["img_size"] = 64
    model = timm.create_model(NAMES[kind], **(small | kwargs)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def images_for(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, dtype=torch.float64)


def by_hand(model: Any, spec: DeliverySpec, images: Tensor, norms: dict[str, Any]) -> Tensor:
    """timm's own parts one after the other, with LN' of the PE added to each block's attention input."""

    def rows(pe: Tensor) -> Tensor:
        bare = model.num_prefix_tokens if model.no_embed_class else 0
        return torch.cat([torch.zeros(1, bare, pe.shape[-1], dtype=pe.dtype), pe], dim=1)

    pos = model.pos_embed
    x = model.patch_embed(images).flatten(1, -2)
    prefix = [token.expand(len(images), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    x = torch.cat([*prefix, x], dim=1)
    if spec.input_pe:
        x = x + rows(pos)
    x = model.norm_pre(x)
    value, chain = pos, [pos]
    for layer, block in enumerate(model.blocks):
        attended = block.norm1(x)
        if spec.first_layer is not None and layer >= spec.first_layer:
            value = norms[f"layer_norms.{layer}"](value if spec.hierarchical else pos)
            attended = attended + rows(value)
        chain.append(value)
        x = x + block.ls1(block.attn(attended))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if "last_norm" in norms:
        x = x + rows(norms["last_norm"](chain[spec.last_index + 1] if spec.last_index else pos))
    return model.forward_head(x)


@every_name
@pytest.mark.parametrize("method", ["default", "gap"])
def test_a_method_that_delivers_nothing_changes_nothing(kind: str, method: str) -> None:
    """With the read-out kept, logits, tokens and intermediates are timm's."""
    model = theirs(kind)
    batch, converted = images_for(model), convert(model, method)
    assert_close(converted(batch), model(batch), 1e-12)
    assert_close(converted.forward_features(batch), model.forward_features(batch), 1e-12)
    for one, other in zip(
        converted.forward_intermediates(batch)[1], model.forward_intermediates(batch)[1], strict=True
    ):
        assert_close(one, other, 1e-12)


@every_name
@pytest.mark.parametrize("method", ["lape", "mpvg", "mpvg_flat", "mpvg_layer0"])
def test_the_converted_network_equals_timms_parts_with_the_pe_added(kind: str, method: str) -> None:
    model = theirs(kind)
    batch, converted = images_for(model), convert(model, method)
    with torch.no_grad():
        for parameter in converted.delivery.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    norms = {name: module for name, module in converted.delivery.named_modules() if isinstance(module, nn.LayerNorm)}
    assert_close(converted(batch), by_hand(model, as_spec(method), batch, norms))
    assert not norms or (converted(batch) - model(batch)).abs().max() > 1e-3
    assert_close(fold(converted)(batch), converted(batch))


@every_name
def test_preserve_begins_unchanged_and_everything_learns(kind: str) -> None:
    """The same answers before the first step; gradients at the PE, at every gain and at every bias; then other answers.

    Gradients of `fresh` are those of a chain that is delivered; those of `preserve` pass through the same LN'.
    """
    model = theirs(kind)
    batch = images_for(model)
    converted = convert(model, "mpvg", start="preserve")
    assert_close(converted(batch), model(batch), 1e-12)
    assert_close(convert(model, "mpvg", start="preserve").float()(batch.float()), model.float()(batch.float()), 1e-5)
    model.double()

    (converted(batch) * torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    for name, parameter in converted.named_parameters():
        if name.startswith("delivery") or name == "pos_embed":
            assert parameter.grad.abs().max() > 1e-9, name
    theirs_too = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in converted.named_parameters()} - theirs_too == {
        name for name, _ in convert(model, "mpvg").named_parameters() if name.startswith("delivery")
    }
    assert [name for name, _ in converted.delivery.named_buffers()] == ["reference_pos"]

    torch.optim.SGD(converted.parameters(), lr=0.1).step()
    after = converted(batch)
    assert (after - model(batch)).abs().max() > 1e-4
    assert_close(fold(converted)(batch), after)


def test_the_gradients_of_preserve_are_those_of_the_chain() -> None:
    """d delivered / d (PE, gain, bias) are those of `fresh`, exactly: the part taken off is constant."""
    model = theirs("deit")
    gradients = []
    for start in ("fresh", "preserve"):
        converted = convert(model, "mpvg", start=start)
        torch.manual_seed(1)
        delivered = converted.deliver(converted.raw_pos_embed())
        values = [pe for pe in (*delivered.per_layer, delivered.last) if pe is not None]
        sum((value * torch.randn_like(value)).sum() for value in values).backward()
        gradients.append({name: p.grad for name, p in converted.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 1 + 2 * 3  # the PE; LN'_1, LN'_2 and the one of the Last LN
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_preserve_holds_at_another_image_size(dynamic: bool) -> None:
    """The copy of the PE is resampled as the PE is."""
    model = theirs("deit", dynamic_img_size=dynamic)
    converted = convert(model, "mpvg", start="preserve")
    if not dynamic:
        model.set_input_size((64, 16))
        converted.set_input_size((64, 16))
        assert converted.delivery.reference_pos.shape == converted.pos_embed.shape
    batch = torch.randn(2, 3, 64, 16, dtype=torch.float64)
    assert_close(converted(batch), model(batch), 1e-9)


@every_name
def test_the_methods_read_out_has_the_last_norm_on_every_token_and_then_the_mean(kind: str) -> None:
    """No class token, no row for it, no pooling attention; and Eq. (11)'s order, whatever timm's was."""
    model = theirs(kind)
    batch = images_for(model)
    converted = convert(model, "mpvg", readout="method")
    assert converted.cls_token is None
    assert converted.attn_pool is None
    assert converted.num_prefix_tokens == model.num_reg_tokens
    rows = model.pos_embed.shape[1] - (model.cls_token is not None and not model.no_embed_class)
    assert torch.equal(converted.pos_embed, model.pos_embed[:, model.pos_embed.shape[1] - rows :])
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    tokens = converted.forward_intermediates(batch, [2], output_fmt="NLC", intermediates_only=True)[0]
    last = converted.deliver(converted.raw_pos_embed()).last
    expected = (norm(tokens) + last[:, last.shape[1] - tokens.shape[1] :]).mean(dim=1)
    pooled = converted.forward_head(converted.forward_features(batch), pre_logits=True)
    assert_close(pooled, expected)
    assert_close(converted(batch), converted.head(expected))
    assert_close(fold(converted)(batch), converted(batch))


def test_the_methods_read_out_equals_a_network_of_this_package() -> None:
    """A DeiT converted to MPVG's read-out is our MPVG with the same weights."""
    model = theirs("deit", img_size=32)
    converted = convert(model, "mpvg", readout="method")
    kwargs: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    ours = create_model("deit_tiny_patch16_224", "mpvg", **kwargs).double().eval()
    ours.load_state_dict(converted.state_dict(), strict=True)
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close(converted(batch), ours(batch), 1e-12)


@every_name
def test_the_original_is_untouched(kind: str) -> None:
    model = theirs(kind).train()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    converted = convert(model, "mpvg", readout="method")
    assert converted.training
    assert converted.delivery.training
    with torch.no_grad():
        for tensor in (*converted.parameters(), *converted.buffers()):
            tensor.zero_()
    assert [type(module) for module in model.modules()] == kinds
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_hooks_and_frozen_parameters_come_along() -> None:
    """A hook on a block still runs, and what was frozen stays frozen."""
    model, seen = theirs("deit"), []
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    model.pos_embed.requires_grad_(False)
    for readout in ("keep", "method"):
        converted = convert(model, "mpvg", readout=readout)
        converted(images_for(model))
        assert not converted.pos_embed.requires_grad
    assert seen == [1, 1]


def test_a_method_of_ones_own_converts_too() -> None:
    own = DeliverySpec(pool="token", first_layer=0, hierarchical=False, last_index=2)
    model = theirs("deit")
    converted = convert(model, own)
    assert converted.spec == own
    assert mpvg.convert(model, own.to_dict()).spec == own


def test_what_is_delivered_to_a_last_norm_needs_one_before_the_pooling() -> None:
    """timm's LN behind the mean has no tokens: with the read-out kept, MPVG is PVG there."""
    model = theirs("reg_gap")
    assert isinstance(model.norm, nn.Identity)
    assert convert(model, "mpvg").spec == METHODS["pvg"]
    assert convert(model, "mpvg", readout="method").spec == METHODS["mpvg"]


@pytest.mark.parametrize("kind", ["deit3", "dinov2"])
def test_a_class_token_without_a_row_receives_nothing_at_the_last_norm(kind: str) -> None:
    """An LN' that only patches receive would be idle: the class token alone is read out."""
    model = theirs(kind)
    assert model.no_embed_class
    assert convert(model, "mpvg").spec == METHODS["pvg_token"]
    assert convert(model, "mpvg", readout="method").spec == METHODS["mpvg"]


@pytest.mark.parametrize("kind", LIKE)
def test_the_feature_maps_of_a_converted_network_by_public_calls(kind: str, tmp_path: Path) -> None:
    """As the refusal of features_only says: its maps contain the PE; pruned, it gives the same ones at lower cost."""
    name, sizes = f"timm/{NAMES[kind]}", {"depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    source = convert(theirs(kind), "mpvg")
    torch.save(source.state_dict(), tmp_path / "own.pth")
    checkpoint = f"{tmp_path / 'own.pth'}::grid=2x3"
    arguments: dict[str, Any] = {"img_size": source.patch_embed.img_size, "checkpoint_path": checkpoint}
    with pytest.raises(ValueError, match=re.escape("call model.forward_intermediates(images, indices, intermediates")):
        create_model(name, "mpvg", features_only=True, **arguments, **sizes)
    model, batch = create_model(name, "mpvg", **arguments, **sizes).double().eval(), images_for(source)
    maps = model.forward_intermediates(batch, [0, 1], intermediates_only=True)
    for one, other in zip(maps, source.forward_intermediates(batch)[1], strict=False):
        assert_close(one, other, 1e-4)
    without = convert(theirs(kind), "default")
    without.load_state_dict({key: value for key, value in model.state_dict().items() if "delivery" not in key})
    assert (without.forward_intermediates(batch)[1][1] - maps[1]).abs().max() > 1e-3

    indices = model.prune_intermediate_layers([0, 1], prune_norm=True)
    for one, other in zip(model.forward_intermediates(batch, indices, intermediates_only=True), maps, strict=True):
        assert torch.equal(one, other)
    left = {name for name, _ in model.named_parameters()}
    assert not [name for name in left if re.match(r"blocks\.2|norm\.|head|delivery\.(layer_norms\.2|last_norm)", name)]


# ---- by name


def test_a_timm_network_by_name(tmp_path: Path) -> None:
    """Weights of timm's network load before the conversion, and those of a converted one after it."""
    sizes: dict[str, Any] = {"img_size": (32, 48), "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    name, model = f"timm/{NAMES['deit']}", theirs("deit")
    batch = images_for(model)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    by_name = create_model(
        name, "mpvg", start="preserve", checkpoint_path=f"{tmp_path}/timm.safetensors::grid=2x3", **sizes
    )
    assert_close(by_name.double().eval()(batch), model(batch), 1e-5)

    converted = convert(model, "mpvg", readout="method", start="fresh")
    with torch.no_grad():
        for parameter in converted.delivery.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    torch.save({"state_dict": converted.state_dict()}, tmp_path / "own.pth")
    again = create_model(name, "mpvg", readout="method", checkpoint_path=f"{tmp_path}/own.pth::grid=2x3", **sizes)
    assert_close(again.double().eval()(batch), converted(batch), 1e-5)
    # a GAP run of it, which has no name that timm's network lacks
    gap = convert(model, "gap", readout="method")
    torch.save(gap.state_dict(), tmp_path / "gap.pth")
    again = create_model(name, "gap", readout="method", checkpoint_path=f"{tmp_path}/gap.pth::grid=2x3", **sizes)
    assert_close(again.double().eval()(batch), gap(batch), 1e-5)


def test_timms_weights_at_another_image_size_are_preserved(tmp_path: Path) -> None:
    """The PE is resampled as timm's set_input_size does, and `preserve` starts from that."""
    model = theirs("deit", img_size=32)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    sizes: dict[str, Any] = {"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    path = tmp_path / "timm.safetensors"
    by_name = create_model(f"timm/{NAMES['deit']}", start="preserve", checkpoint_path=path, **sizes).double().eval()
    model.set_input_size(64)
    batch = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_close(by_name(batch), model(batch), 1e-5)


@pytest.mark.parametrize("file", ["run.safetensors", "run.pth"])
def test_files_with_the_earlier_name_of_the_reference_pe_load(file: str, tmp_path: Path) -> None:
    """`delivery.start` was the name of `delivery.reference_pos`: both are read, also after a wrapper's prefix."""
    sizes: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    saved, path = convert(theirs("deit", img_size=32), "mpvg", start="preserve"), tmp_path / file
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # so that the PE is no longer the one that was copied
    state = saved.state_dict()
    resampled = ref_resampled(saved.delivery.reference_pos[0], (2, 2), (3, 3), 1)
    for earlier in ("delivery.start", "delivery.reference_pos"):
        names = {name: name.replace("delivery.reference_pos", earlier) for name in state}
        tensors = {f"module.{names[name]}": value for name, value in state.items()}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        assert read_tensors(path).keys() == state.keys()
        model = convert(theirs("deit", img_size=32), "mpvg", start="preserve")
        load_weights(model, path)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

        by_name = partial(create_model, f"timm/{NAMES['deit']}", "mpvg", start="preserve", checkpoint_path=path)
        assert_close(by_name(**sizes).delivery.reference_pos.double(), saved.delivery.reference_pos, 1e-6)
        larger = by_name(**sizes | {"img_size": 48})
        assert_close(larger.delivery.reference_pos[0].double(), resampled, 1e-5)


def test_pos_std_by_name_rescales_the_same_draw() -> None:
    sizes: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    states = []
    for std in (None, 1.0):
        torch.manual_seed(3)
        states.append(create_model(f"timm/{NAMES['deit']}", "gap", readout="method", pos_std=std, **sizes).state_dict())
    for key, value in states[0].items():
        assert torch.equal(states[1][key], 50 * value if key == "pos_embed" else value), key


# ---- refusals


class Changed(VisionTransformer):
    """A network whose forward pass may be anything."""


def small(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: convert(small("vit_base_patch16_rope_224")),
            r"its PE is rotary, inside the attention, and only an abs",
        ),
        (lambda: convert(small("vit_small_patch16_dinov3")), r"vit_small_patch16_dinov3 cannot .*: its PE is rotary"),
        (lambda: convert(small("vit_relpos_small_patch16_224")), r"its PE is relative, inside the attention"),
        (lambda: convert(small("swin_tiny_patch4_window7_224")), r"its PE is relative"),
        (lambda: convert(small("beit_base_patch16_224")), r"beit_base_patch16_224 cannot .*: its PE is relative"),
        (lambda: convert(small("resnet18")), r"resnet18 cannot be converted: convert takes timm's VisionTransformer, "),
        (
            lambda: convert(nn.Linear(2, 2)),
            r"Linear cannot .* this is torch\.nn\.\S+\.Linear; change .*own\.md",
        ),
        (lambda: convert(small("vit_tiny_patch16_224", pos_embed="none")), r"has no absolute PE"),
        (
            lambda: convert(small("eva02_tiny_patch14_224")),
            r"convert takes timm's VisionTransformer, .* this is timm\.models\.eva\.Eva; change its class to a Del",
        ),
        (lambda: convert(small("deit_tiny_distilled_patch16_224")), r"VisionTransformerDistilled is a subclass of"),
        (
            lambda: convert(Changed(depth=1, embed_dim=8, num_heads=2)),
            r"Changed is a subclass of .* may differ; .*own",
        ),
        (lambda: convert(small("vit_base_patch16_rpn_224")), r"its blocks are ResPostBlock, and only timm's Block"),
        (lambda: convert(create_model("vit_mini_patch2_8")), r"already receives a delivered PE; build a new one"),
        (lambda: convert(theirs("deit"), readout="avg"), r"readout is 'avg'; allowed: 'keep', 'method'"),
        (lambda: convert(theirs("deit"), start="warm"), r"start is 'warm'; allowed: 'fresh', 'preserve'"),
        (lambda: convert(theirs("deit"), "mvpg"), r"unknown method 'mvpg'; did you mean mpvg"),
        (
            lambda: convert(theirs("deit"), "mpvg_last5"),
            r"last_index 5 asks for pos_5, but deit_tiny_patch16_224 has 3",
        ),
        (lambda: convert(theirs("deit"), readout="method", start="preserve"), r"readout='method' changes the outputs"),
        (
            lambda: convert(theirs("deit"), "lape", start="preserve"),
            r"removing the PE from the input changes the outputs; use start='fresh'",
        ),
        (
            lambda: convert(theirs("siglip"), "pvg_token", readout="method"),
            r"has no class token to read out; use a meth",
        ),
        (
            lambda: convert(theirs("deit", final_norm=False), readout="method"),
            r"has no Last LN, which the read-out needs",
        ),
        (
            lambda: create_model("timm/vit_tiny_patch16"),
            r"unknown timm model 'vit_tiny_patch16'; did you mean vit_tiny",
        ),
        (lambda: create_model("timm/resnet18"), r"resnet18 cannot be converted"),
        (lambda: create_model("timm/resnet18", pos_std=1.0), r"resnet18 cannot be converted"),
        (lambda: create_model("timm/vit_tiny_patch16_224", start="late"), r"start is 'late'"),
        (lambda: create_model("timm/vit_tiny_patch16_224.nonsense"), r"cannot be built: Invalid pretrained tag"),
        (lambda: create_model("timm/vit_tiny_patch16_224", widht=3), r"cannot be built: .*argument 'widht'"),
        (lambda: create_model("timm/vit_tiny_patch16_224", img_size=30), r"image size 30 is not divisible by .* 16"),
        (
            lambda: create_model("timm/vit_tiny_patch16_224", features_only=True),
            r"call model.forward_intermediates\(images, indices, int",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(build: Callable[[], object], message: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=message):
        build()


def test_a_converted_checkpoint_has_no_start_to_preserve(tmp_path: Path) -> None:
    """Its LN' are trained: there are no original answers to go on from."""
    sizes: dict[str, Any] = {"img_size": (32, 48), "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    torch.save(convert(theirs("deit"), "mpvg").state_dict(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"delivery\.reference_pos is missing"):
        create_model(f"timm/{NAMES['deit']}", start="preserve", checkpoint_path=tmp_path / "own.pth", **sizes)
