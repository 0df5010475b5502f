"""Weights of classifiers and of the original repository in the dense networks; what cannot stand inside."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec
from mpvg.models import create_model
from mpvg.models.convert import convert
from mpvg.models.dense import create_adapter
from mpvg.models.dense.official import BACKBONE, Change, Part, load_official
from mpvg.models.dense.trunk import without_readout
from reference import scattered

NARROW: dict[str, Any] = {"embed_dim": 16, "num_heads": 2}
VIT = "vit_canvas_patch16_64"


def small(method: Any = "mpvg", **kwargs: Any) -> Any:
    return create_adapter("vit_adapter_canvas", method, forward="detection", **NARROW, **kwargs)


def classifier_file(folder: Path, method: Any, **kwargs: Any) -> tuple[Path, dict[str, Tensor]]:
    model = create_model(VIT, method, num_classes=3, **NARROW, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors", state


# ---- classifiers


@pytest.mark.parametrize(
    ("method", "inside"),
    [*((method, method) for method in METHODS), ("default", "mpvg"), ("mpvg", "default"), ("lape", "mpvg")],
)
def test_a_classifier_of_every_method_loads(method: str, inside: str, tmp_path: Path) -> None:
    """Into its own method, and into some of another read-out; everything in the file is accounted for."""
    depth = max(4, (METHODS[method].last_index or 0) // 4 * 4 + 4)
    path, state = classifier_file(tmp_path, method, depth=depth)
    model = small(inside, depth=depth, checkpoint_path=path)
    loaded, report = model.vit.state_dict(), model.load_report
    prefix = state["pos_embed"].shape[1] - 16
    assert torch.equal(loaded["pos_embed"], state["pos_embed"][:, prefix:])
    shared = (loaded.keys() & state.keys()) - {"pos_embed"}
    assert all(torch.equal(loaded[name], state[name]) for name in shared)
    assert len([name for name in shared if name.startswith("blocks.")]) == 12 * depth

    assert set(report.taken) == shared | {"pos_embed"}
    assert set(report.new) == loaded.keys() - state.keys()
    assert {n for n in report.new if "layer_norms" not in n} == {
        f"blocks.{i}.ls{k}.gamma" for i in range(depth) for k in (1, 2)
    }
    rows = {f"pos_embed[:, :{prefix}]"} if prefix else set()
    assert set(report.dropped) == (state.keys() - loaded.keys()) | rows
    assert {"norm.weight", "head.bias"} <= set(report.dropped)


def test_registers_of_a_classifier_are_dropped_with_their_rows(tmp_path: Path) -> None:
    path, state = classifier_file(tmp_path, "default", reg_tokens=2)
    model = small("default", checkpoint_path=path)
    assert torch.equal(model.vit.pos_embed, state["pos_embed"][:, 3:])
    assert {"cls_token", "reg_token", "pos_embed[:, :3]"} <= set(model.load_report.dropped)
    assert "a dense network has no tokens but the patches'" in str(model.load_report)


def test_the_pe_of_another_image_size_is_resampled_as_in_the_forward_pass(tmp_path: Path) -> None:
    path, state = classifier_file(tmp_path, "gap", img_size=96)
    model = small("gap", checkpoint_path=path)
    maps = state["pos_embed"][0].T.reshape(1, 16, 6, 6)
    expected = F.interpolate(maps, size=(4, 4), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(model.vit.pos_embed[0], expected)
    assert model.load_report.resampled == {"pos_embed": "from a grid of 6 x 6 to 4 x 4"}


def test_a_checkpoint_of_lape_s_repository_loads(tmp_path: Path) -> None:
    _, state = classifier_file(tmp_path, "lape")
    theirs = {re.sub(r"^delivery\.layer_norms\.(\d+)\.", r"blocks.\1.pe_norm.", n): v for n, v in state.items()}
    torch.save({"model": theirs}, tmp_path / "lape.pth")
    model = small("lape", checkpoint_path=tmp_path / "lape.pth")
    for layer in range(4):
        name = f"delivery.layer_norms.{layer}.weight"
        assert torch.equal(model.vit.state_dict()[name], state[name])


def test_methods_start_alike() -> None:
    """With one seed, whatever the method, so that they differ in nothing but the method."""
    states = []
    for method in ("default", "lape", "mpvg"):
        torch.manual_seed(0)
        states.append(small(method).state_dict())
    for name, value in states[0].items():
        assert all(torch.equal(value, other[name]) for other in states[1:]), name


# ---- what the network says, and what stands inside


@pytest.mark.parametrize(
    ("method", "remark"),
    [
        ("gap", ""),
        ("pvg", ""),
        ("lape_gap", ""),
        ("default", "it has no class token and no register, only patches"),
        ("mpvg", "it has no Last LN, so nothing is delivered there and it runs as pvg"),
        ("mpvg_flat", "it has no Last LN, so nothing is delivered there and it runs as pvg, hierarchical=False"),
        ("gap_last0", "it has no Last LN, so nothing is delivered there and it runs as gap"),
    ],
)
def test_the_remark_says_what_is_left_out(method: str, remark: str) -> None:
    model = small(method)
    assert model.remark == remark
    assert model.spec.last_index is None
    assert model.vit.delivery.last_norm is None


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),  # a class token with a row
        ("deit3_small_patch16_224", {}),  # one without a row, and a layer scale of its own
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("vit_base_patch16_siglip_224", {}),  # attention pooling
        ("vit_base_patch16_clip_224", {}),  # an LN before the layers
    ],
)
def test_timms_networks_stand_inside(name: str, kwargs: dict[str, Any]) -> None:
    sizes = {"embed_dim": 12, "num_heads": 2, "depth": 4, "img_size": 64}
    model: Any = create_adapter(
        "vit_adapter_tiny", "mpvg", forward="detection", vit=f"timm/{name}", **sizes, **kwargs
    ).eval()
    maps = model(torch.randn(1, 3, 64, 96))
    assert [one.shape for one in maps] == [(1, 12, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    assert model.vit.pos_embed.shape == (1, 16, 12)
    assert model.spec == METHODS["pvg"]
    names = [n for n, _ in model.vit.named_parameters()]
    allowed = r"pos_embed|patch_embed\.|norm_pre\.|blocks\.|delivery\.layer_norms\."
    assert not [n for n in names if not re.match(allowed, n)]
    theirs: Any = timm.create_model(name, **sizes, **kwargs)
    scale = theirs.blocks[0].ls1
    expected = 1.0 if isinstance(scale, nn.Identity) else scale.gamma[0].item()
    assert model.vit.blocks[0].ls1.gamma[0].item() == pytest.approx(expected)


def test_a_converted_network_keeps_the_rows_of_its_patches() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=12, num_heads=2, img_size=64, reg_tokens=2)
    vit = without_readout(convert(theirs, "pvg_token"), "pvg_token")
    assert torch.equal(vit.pos_embed, theirs.pos_embed[:, 3:])
    assert torch.equal(vit.raw_pos_embed((4, 4)), theirs.pos_embed[:, 3:])
    assert vit.remark == "it has no class token and no register, only patches"


def create(vit: str | None = None, method: Any = "mpvg", name: str = "vit_adapter_tiny", **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return create_adapter(name, method, **({"forward": "detection", "vit": vit} | kwargs))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create("timm/vit_small_patch14_dinov2"), r"patches are 14 x 14 pixels, .*allowed: a patch size of 16"),
        (lambda: create("vit_mini_patch4_32"), r"vit_mini_patch4_32 .* patches are 4 x 4 pixels"),
        (lambda: create(depth=10), r"its 10 layers cannot be divided into 4 equal stages; allowed: .* divisible by 4"),
        (lambda: create("timm/vit_small_patch16_dinov3"), r"its PE is rotary, inside the attention"),
        (lambda: create("timm/vit_relpos_small_patch16_224"), r"its PE is relative, inside the attention"),
        (lambda: create("timm/beit_base_patch16_224"), r"its PE is relative, inside the attention"),
        (lambda: create("ceit_tiny_patch16_224"), r"CeiT has a stem or layers of its own; allowed: .*ViT and DeiT"),
        (lambda: create("t2t_vit_7"), r"T2TViT has a stem or layers of its own"),
        (lambda: create("swin_tiny_patch4_window7_224"), r"DeliveredSwinTransformer has a stem or layers of its own"),
        (lambda: create("timm/vit_tiny_patch16_22"), r"unknown timm model 'vit_tiny_patch16_22'; did you mean"),
        (
            lambda: create(name="vit_adapter_tini"),
            r"unknown dense network 'vit_adapter_tini'; did you mean vit_adapter",
        ),
        (lambda: create(method="mpgv"), r"unknown method 'mpgv'; did you mean mpvg"),
        (lambda: create(method="mpvg_last11", depth=8), r"last_index 11 asks for pos_11, but a dense network has 8"),
        (
            lambda: create(forward="classification"),
            r"forward is 'classification'; allowed: 'detection', 'segmentation'",
        ),
        (lambda: create(patch_drop_rate=0.1), r"drops patches, but the maps need all of them"),
        (lambda: create(num_classes=3), r"num_classes=3: a dense network decides it"),
        (lambda: create("timm/vit_tiny_patch16_224", start="preserve"), r"start='preserve': a dense network decides"),
        (lambda: create(checkpoint_path="x", pos_std=1.0), r"pos_std=1.0 rescales a new PE, but x has a trained one"),
        (lambda: create(attn_layer="diff"), r"layer 0 has an attention of its own \(DiffAttention\)"),
    ],
)
def test_what_cannot_be_built_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_an_attention_of_its_own_runs_without_windows() -> None:
    model = create(attn_layer="diff", forward="segmentation", depth=4)
    assert not model.windows


# ---- the original's checkpoints


OFFICIAL = [
    "pos_embed",
    "level_embed",
    "patch_embed.proj.weight",
    "blocks.0.gamma1",
    "blocks.3.gamma2",
    "blocks.2.attn.qkv.bias",
    "blocks.1.mlp.fc2.weight",
    "spm.stem.0.weight",
    "spm.stem.7.running_var",
    "spm.conv4.1.num_batches_tracked",
    "spm.fc1.bias",
    "interactions.0.injector.gamma",
    "interactions.0.injector.attn.sampling_offsets.bias",
    "interactions.1.extractor.ffn.dwconv.dwconv.weight",
    "interactions.2.extractor.attn.attention_weights.weight",
    "interactions.3.extra_extractors.1.ffn_norm.weight",
    "interactions.3.extra_extractors.0.attn.value_proj.bias",
    "interactions.3.extractor.feat_norm.weight",
    "interactions.1.injector.query_norm.bias",
    "interactions.1.injector.attn.output_proj.weight",
    "up.weight",
    "norm4.running_mean",
]
"""Names that the original's network has, of each kind."""


def official(model: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under the original's names, with the class token's row, and a neck's beside them."""
    found = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^vit\.", "", name)
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma\1", name)
        name = name.replace(".ffn.dwconv.", ".ffn.dwconv.dwconv.")
        found[f"backbone.{name}"] = torch.cat([value[:, :1], value], dim=1) if name == "pos_embed" else value.clone()
    return found | {"neck.fpn_convs.0.conv.weight": torch.zeros(1)}


def save_official(folder: Path, tensors: dict[str, Tensor]) -> Path:
    meta = {"CLASSES": ("person",), "epoch": 36, "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": tensors, "optimizer": {"state": {0: {"step": 3}}}}, folder / "x.pth")
    return folder / "x.pth"


def other(method: Any = "default") -> Any:
    return scattered(small(method)).float()


def test_an_original_checkpoint_loads(tmp_path: Path) -> None:
    theirs, model = other(), other()
    tensors = official(theirs)
    assert {f"backbone.{name}" for name in OFFICIAL} <= tensors.keys()
    report = load_official(model, save_official(tmp_path, tensors))
    image = torch.randn(1, 3, 64, 96)
    assert all(torch.equal(a, b) for a, b in zip(model(image), theirs(image), strict=True))
    assert list(report.resampled) == ["vit.pos_embed"]
    assert report.dropped == {"neck.fpn_convs.0.conv.weight": "of a part that is not loaded"}
    assert set(report.taken) == model.state_dict().keys() - {"vit.pos_embed"}
    assert report.new == {}


def test_an_original_checkpoint_has_no_ln_of_a_pe(tmp_path: Path) -> None:
    model = other("mpvg")
    report = load_official(model, save_official(tmp_path, official(other())))
    assert set(report.new) == {f"vit.delivery.layer_norms.{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.up.weight": None}, r"up\.weight is missing"),
        ({"backbone.up.wight": torch.zeros(1)}, r"backbone\.up\.wight has no place in the network"),
        ({"backbone.up.bias": torch.zeros(3)}, r"backbone\.up\.bias is \(3,\), the network's is \(16,\)"),
        ({"backbone.pos_embed": torch.zeros(1, 26, 16)}, r"pos_embed is \(1, 26, 16\), the network's is \(1, 16, 16\)"),
    ],
)
def test_an_original_checkpoint_that_does_not_fit_changes_nothing(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {n: v for n, v in (official(other()) | change).items() if v is not None}
    model = other()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_official(model, save_official(tmp_path, tensors))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_parts_are_data(tmp_path: Path) -> None:
    """A network that holds a backbone and a head loads both; the head's rows come in another order."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = other()
            self.classes = nn.Linear(2, 3)

    def background_first(given: Tensor, own: Tensor) -> Tensor:
        return given.roll(1, dims=0)

    head = Part(
        prefix="roi_head.fc_cls.",
        place="classes.",
        changes=(Change(name=r"^(weight|bias)$", apply=background_first, reason="the background comes first"),),
    )
    weight, bias = torch.arange(6.0).reshape(3, 2), torch.tensor([1.0, 2.0, 3.0])
    model, backbone = Detector(), other()
    tensors = official(backbone) | {"roi_head.fc_cls.weight": weight, "roi_head.fc_cls.bias": bias}
    report = load_official(model, save_official(tmp_path, tensors), (replace(BACKBONE, place="body."), head))
    assert model.classes.bias.tolist() == [3, 1, 2]
    assert model.classes.weight.tolist() == [[4, 5], [0, 1], [2, 3]]
    assert torch.equal(model.body.up.weight, backbone.up.weight)
    assert {report.resampled[f"classes.{part}"] for part in ("weight", "bias")} == {"the background comes first"}


def test_an_own_method_is_a_spec() -> None:
    spec = DeliverySpec(pool="token", first_layer=0, hierarchical=False, last_index=3)
    assert small(spec).spec == DeliverySpec(first_layer=0, hierarchical=False)
