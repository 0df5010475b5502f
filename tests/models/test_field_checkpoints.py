"""Files as people have them: other grids, entries, prefixes, extras and channels, each taken as it is or refused."""

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mpvg.models import create_model, load_checkpoint
from mpvg.models.checkpoints import read_tensors

NAME = "vit_mini_patch2_8"
TIMM = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
SMALL: dict[str, Any] = {"img_size": 48, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}


def ours(method: str = "gap", **kwargs: Any) -> Any:
    """A small network of this package in which no parameter is where it starts."""
    return moved(create_model(NAME, method, **TINY | kwargs))


def theirs(name: str = TIMM, **kwargs: Any) -> Any:
    """A small network of timm's in which no parameter is where it starts."""
    return moved(timm.create_model(name, **(SMALL | kwargs)))


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def resampled(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """`(1, h * w, D)` on another grid, by torch's interpolation alone."""
    grid = rows.detach().reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False).flatten(2).transpose(1, 2)


# ---- C1, C2: grids


@pytest.mark.parametrize("new", [(8, 18), (18, 8), (6, 24), (4, 36), (6, 6), (9, 7)])
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_square_grid_is_resampled_to_any_other_even_of_as_many_patches(
    new: tuple[int, int], tokens: int, tmp_path: Path
) -> None:
    """12 x 12 patches into 8 x 18: as many rows, other places."""
    method = "default" if tokens else "gap"
    source = ours(method, img_size=24)
    model = ours(method, img_size=tuple(2 * side for side in new))
    report = load_checkpoint(model, saved(source.state_dict(), tmp_path / "a.pth"))
    expected = resampled(source.pos_embed[:, tokens:], (12, 12), new)
    torch.testing.assert_close(model.pos_embed.detach()[:, tokens:], expected)
    assert torch.equal(model.pos_embed[:, :tokens], source.pos_embed[:, :tokens])
    assert report.resampled == {"pos_embed": f"from a grid of 12 x 12 to {new[0]} x {new[1]}"}
    assert "pos_embed" not in report.taken


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize(("old", "new"), [((6, 12), (12, 6)), ((6, 10), (10, 6)), ((2, 3), (3, 2)), ((2, 3), (2, 3))])
def test_a_grid_that_is_not_square_must_be_given(
    old: tuple[int, int], new: tuple[int, int], tokens: int, tmp_path: Path
) -> None:
    """Refused, although the numbers of rows are equal; with FILE::grid=HxW the PE is resampled from there."""
    method = "default" if tokens else "gap"
    source = ours(method, img_size=tuple(2 * side for side in old))
    path = saved(source.state_dict(), tmp_path / "a.pth")
    model = ours(method, img_size=tuple(2 * side for side in new))
    before = copied(model)
    with pytest.raises(ValueError, match=rf"is not a square grid .*a\.pth::grid={new[0]}x{new[1]} if the file is for"):
        load_checkpoint(model, path)
    assert unchanged(model, before)
    report = load_checkpoint(model, f"{path}::grid={old[0]}x{old[1]}")
    expected = resampled(source.pos_embed[:, tokens:], old, new) if old != new else source.pos_embed[:, tokens:]
    torch.testing.assert_close(model.pos_embed.detach()[:, tokens:], expected.detach())
    assert ("pos_embed" in report.resampled) == (old != new)
    assert ("pos_embed" in report.taken) == (old == new)


def test_a_square_number_of_patches_may_be_said_not_to_be_square(tmp_path: Path) -> None:
    source, model = ours(img_size=(16, 36)), ours(img_size=(16, 36))
    path = saved(source.state_dict(), tmp_path / "a.pth")
    load_checkpoint(model, f"{path}::grid=8x18")
    assert unchanged(model, source.state_dict())
    load_checkpoint(model, path)
    torch.testing.assert_close(model.pos_embed.detach(), resampled(source.pos_embed, (12, 12), (8, 18)))


def test_a_row_of_patches_is_not_taken_for_a_class_token(tmp_path: Path) -> None:
    """DeiT-III: a class token without a row, so 196 rows are 14 x 14, and not 1 and 13 x 15."""
    source = theirs("deit3_small_patch16_224", img_size=224, embed_dim=24)
    path = saved({"model": source.state_dict()}, tmp_path / "deit3.pth")
    sizes: dict[str, Any] = SMALL | {"img_size": (208, 240)}
    model: Any = create_model("timm/deit3_small_patch16_224", "default", checkpoint_path=path, **sizes)
    torch.testing.assert_close(model.pos_embed.detach(), resampled(source.pos_embed, (14, 14), (13, 15)))
    assert not model.load_report.dropped


@pytest.mark.parametrize("grid", ["12", "12x", "0x6", "axb", "3x4x5", ""])
def test_a_grid_that_is_none_is_refused(grid: str, tmp_path: Path) -> None:
    path = saved(ours().state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is not a grid; give rows and columns, such as grid=14x14"):
        load_checkpoint(ours(), f"{path}::grid={grid}")


def test_a_grid_of_another_number_of_patches_is_refused(tmp_path: Path) -> None:
    path = saved(ours().state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"pos_embed has 16 rows, with 0 leading tokens, and not the 15 of a grid of 3"
    ):
        load_checkpoint(ours(), f"{path}::grid=3x5")


@pytest.mark.parametrize("image", [(28, 8), (8, 28)])
def test_windows_that_are_not_square_are_not_guessed(image: tuple[int, int], tmp_path: Path) -> None:
    """A table for windows of 7 x 2 has as many rows as one of 2 x 7."""
    sizes: dict[str, Any] = {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2), "num_classes": 3}
    source = moved(create_model("swin_mini_patch2_28", "gap", img_size=image, **sizes))
    path = saved(source.state_dict(), tmp_path / "a.pth")
    model = moved(create_model("swin_mini_patch2_28", "gap", img_size=image, **sizes))
    with pytest.raises(ValueError, match=r"relative_position_bias_table has \d+ rows, which is not a square window"):
        load_checkpoint(model, path)
    load_checkpoint(model, f"{path}::grid={image[0] // 2}x{image[1] // 2}")
    assert unchanged(model, source.state_dict())


# ---- C3: entries and prefixes

PREFIXES = [
    "",
    "model.",
    "backbone.",
    "encoder.",
    "module.",
    "module.model.",
    "net.vit.0.",
    "_orig_mod.",
    "a.module.b.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", [None, "net", "teacher", "state_dict", "weights.ema"])
def test_the_one_set_that_fits_is_taken_and_named(prefix: str, entry: str | None, tmp_path: Path) -> None:
    source, model = ours("default"), ours("default")
    content: Any = {prefix + key: value for key, value in source.state_dict().items()}
    for name in reversed(entry.split(".") if entry else []):
        content = {name: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    report = load_checkpoint(model, saved(content, tmp_path / "a.pth"))
    assert unchanged(model, source.state_dict())
    named = ".".join(filter(None, [entry, prefix.replace("_orig_mod.", "").rstrip(".")]))
    assert report.entry == named
    assert not named or f"a.pth, entry {named}, names of timm: " in str(report)
    assert len(report.taken) == len(source.state_dict())


def test_an_averaged_model_is_taken_without_its_counter(tmp_path: Path) -> None:
    source, model = ours(), ours()
    averaged = AveragedModel(source)
    report = load_checkpoint(model, saved({"ema": averaged.state_dict()}, tmp_path / "a.pth"))
    assert unchanged(model, source.state_dict())
    assert report.entry == "ema.module"
    assert report.dropped == {"n_averaged": "not a part of the network, whose names begin with 'module.'"}


def test_what_else_a_training_module_holds_is_dropped_and_reported(tmp_path: Path) -> None:
    """A state of Lightning: the network, its loss and its metrics."""
    source, model = ours(), ours()
    content = {f"model.backbone.{key}": value for key, value in source.state_dict().items()}
    content |= {"loss.weight": torch.ones(3), "model.projector.0.weight": torch.ones(2, 2)}
    path = saved({"state_dict": content, "hyper_parameters": {"lr": 0.1}}, tmp_path / "a.ckpt")
    report = load_checkpoint(model, path)
    assert unchanged(model, source.state_dict())
    assert report.entry == "state_dict.model.backbone"
    assert set(report.dropped) == {"loss.weight", "model.projector.0.weight"}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("wanted", ["student", "teacher"])
def test_of_several_that_fit_one_must_be_chosen(wanted: str, nested: bool, tmp_path: Path) -> None:
    """DINO's file; its heads are not a part of the network."""
    sources = {"student": ours(), "teacher": ours()}
    content: Any = {
        name: {f"module.backbone.{key}": value for key, value in source.state_dict().items()}
        | {"module.head.mlp.0.weight": torch.ones(2, 2)}
        for name, source in sources.items()
    }
    if not nested:
        content = {f"{name}.{key}": value for name, part in content.items() for key, value in part.items()}
    path = saved(content, tmp_path / "dino.pth")
    model = ours()
    before = copied(model)
    with pytest.raises(
        ValueError, match=r"2 sets .* fit: student\.module\.backbone, teacher\.module\.backbone; choose"
    ):
        load_checkpoint(model, path)
    assert unchanged(model, before)
    for choice in (wanted, f"{wanted}.module", f"{wanted}.module.backbone"):
        report = load_checkpoint(model, f"{path}::{choice}")
        assert unchanged(model, sources[wanted].state_dict())
        assert report.entry == f"{wanted}.module.backbone"
    with pytest.raises(
        ValueError, match=r"has no entry 'tutor'; entries with weights of this network: student\.module"
    ):
        load_checkpoint(model, f"{path}::tutor")


def test_an_entry_and_a_grid_may_both_be_given(tmp_path: Path) -> None:
    source = ours(img_size=(4, 6))
    path = saved({"a": ours(img_size=(4, 6)).state_dict(), "b": source.state_dict()}, tmp_path / "a.pth")
    for given in (f"{path}::b::grid=2x3", f"{path}::grid=2x3::b"):
        model = create_model(NAME, "gap", img_size=(4, 6), checkpoint_path=given, **TINY)
        assert unchanged(model, source.state_dict())


def test_an_entry_of_another_network_is_passed_over(tmp_path: Path) -> None:
    source, model = ours(), ours()
    content = {
        "model": ours(embed_dim=12).state_dict(),
        "net": source.state_dict(),
        "discriminator": {"w": torch.ones(1)},
    }
    report = load_checkpoint(model, saved(content, tmp_path / "a.pth"))
    assert report.entry == "net"
    assert unchanged(model, source.state_dict())


@pytest.mark.parametrize(
    ("entries", "taken"),
    [(("model", "model_ema"), "model"), (("state_dict", "state_dict_ema"), "state_dict_ema")],
)
def test_what_training_scripts_evaluate_is_preferred_and_the_other_can_be_chosen(
    entries: tuple[str, str], taken: str, tmp_path: Path
) -> None:
    sources = {entry: ours() for entry in entries}
    path = saved({entry: source.state_dict() for entry, source in sources.items()}, tmp_path / "a.pth")
    model = ours()
    assert load_checkpoint(model, path).entry == taken
    assert unchanged(model, sources[taken].state_dict())
    for entry in entries:
        load_checkpoint(model, f"{path}::{entry}")
        assert unchanged(model, sources[entry].state_dict())


def test_a_file_with_colons_in_its_name_is_that_file(tmp_path: Path) -> None:
    source, model = ours(), ours()
    load_checkpoint(model, saved(source.state_dict(), tmp_path / "run::best.pth"))
    assert unchanged(model, source.state_dict())


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], {"a": {"b": {"c": 1}}}, "text"])
def test_a_file_without_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a\.pth contains a (dict|list|str) without weights by name; give a state_dict"
    ):
        load_checkpoint(ours(), saved(content, tmp_path / "a.pth"))


def test_a_file_that_contains_itself_is_read(tmp_path: Path) -> None:
    source, model = ours(), ours()
    content: dict[str, Any] = {"net": source.state_dict()}
    content |= {"again": content, "once_more": {"inside": content}}
    path = saved(content, tmp_path / "a.pth")
    for entry in ("net", "again.net"):
        assert load_checkpoint(model, f"{path}::{entry}").entry.endswith("net")
        assert unchanged(model, source.state_dict())


def test_equal_weights_under_two_names_have_both(tmp_path: Path) -> None:
    """A pickle contains such a mapping once."""
    state = ours().state_dict()
    path = saved({"student": state, "teacher": state}, tmp_path / "a.pth")
    for entry in ("student", "teacher"):
        assert load_checkpoint(ours(), f"{path}::{entry}").entry == entry


@pytest.mark.parametrize(
    "odd",
    [
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
        lambda value: value[:1].clone().expand(10**6, *value.shape[1:]),
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        lambda value: value.to(torch.complex64),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:.*quantize", "ignore:.*TypedStorage")
def test_a_tensor_that_is_not_dense_is_no_weight(odd: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    state = ours().state_dict()
    state["head.weight"] = odd(state["head.weight"])
    path = saved(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"head\.weight"):
        read_tensors(path)
    model = ours()
    before = model.head.weight.clone()
    load_checkpoint(model, path)  # as a file without a head
    assert torch.equal(model.head.weight, before)
    assert "head.weight" in model.load_report.new


# ---- C4: distilled DeiT


def distilled(tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    state = theirs("deit_tiny_distilled_patch16_224").state_dict()
    assert state["pos_embed"].shape[1] == 9 + 2
    return state, saved({"model": state}, tmp_path / "deit_distilled.pth")


@pytest.mark.parametrize("image", [48, 64])
@pytest.mark.parametrize("readout", [None, "method"])
def test_of_a_distilled_deit_average_pooling_takes_the_patches(readout: str | None, image: int, tmp_path: Path) -> None:
    state, path = distilled(tmp_path)
    sizes: dict[str, Any] = SMALL | {"img_size": image}
    name = "deit_tiny_patch16_224" if readout is None else "timm/deit_tiny_patch16_224"
    more = {} if readout is None else {"readout": readout}
    model: Any = create_model(name, "gap", checkpoint_path=path, **sizes, **more)
    side = image // 16
    expected = resampled(state["pos_embed"][:, 2:], (3, 3), (side, side)) if side != 3 else state["pos_embed"][:, 2:]
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert set(model.load_report.dropped) == {
        *("cls_token", "dist_token", "head_dist.weight", "head_dist.bias", "pos_embed[:, :2]")
    }
    assert "dropped: dist_token, head_dist.weight, head_dist.bias: of the distillation token" in str(model.load_report)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "timm/deit_tiny_patch16_224"])
def test_of_a_distilled_deit_no_class_token_is_taken(name: str, tmp_path: Path) -> None:
    _, path = distilled(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit: it is a distilled DeiT, .*give a method with pool='avg'\. Use"
    ):
        create_model(name, "default", checkpoint_path=path, **SMALL)


# ---- C5: official files of networks of timm's


@pytest.mark.parametrize("suffix", ["", "reg4_"])
def test_an_official_dinov2_file_is_the_network_of_timms(suffix: str, tmp_path: Path) -> None:
    """With a mask token; registers under another name, and the class token's row in the PE."""
    name = f"vit_small_patch14_{suffix}dinov2"
    source = theirs(name, img_size=42)
    official = copied(source)
    official["mask_token"] = torch.ones(1, 24)
    if suffix:
        row = torch.randn(1, 1, 24)
        official["register_tokens"] = official.pop("reg_token")
        official["cls_token"] = official["cls_token"] - row
        official["pos_embed"] = torch.cat([row, official["pos_embed"]], dim=1)
    path = saved(official, tmp_path / "dinov2.pth")
    images = torch.randn(2, 3, 42, 42)
    model: Any = create_model(f"timm/{name}", "default", checkpoint_path=path, **SMALL | {"img_size": 42})
    torch.testing.assert_close(model.eval()(images), source(images), rtol=0, atol=1e-5)
    assert model.load_report.dropped == {"mask_token": "for masked images in pretraining only"}
    larger: Any = create_model(f"timm/{name}", checkpoint_path=path, **SMALL | {"img_size": 56, "num_classes": 7})
    assert larger.load_report.resampled == {"pos_embed": "from a grid of 3 x 3 to 4 x 4"}


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_maes_file_loads_without_its_decoder(name: str, tmp_path: Path) -> None:
    source = theirs()
    extras = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 10, 8),
        "decoder_embed.weight": torch.ones(8, 24),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8),
        "decoder_norm.bias": torch.ones(8),
        "decoder_pred.weight": torch.ones(768, 8),
    }
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("head")}
    path = saved({"model": state | extras}, tmp_path / "mae.pth")
    model: Any = create_model(name, "default", checkpoint_path=path, **SMALL)
    assert model.load_report.dropped.keys() == extras.keys()
    assert model.load_report.new == dict.fromkeys(("head.weight", "head.bias"), "the file has no head")
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(
        model.eval().forward_features(images), source.forward_features(images), rtol=0, atol=1e-5
    )


def test_the_last_norm_of_a_network_with_average_pooling_is_the_one_after_it(tmp_path: Path) -> None:
    """MAE's fine-tuned files have fc_norm and no norm: it becomes the Last LN, and the report says so."""
    source = theirs(global_pool="avg")
    assert "norm.weight" not in source.state_dict()
    path = saved({"model": source.state_dict()}, tmp_path / "mae.pth")
    model: Any = create_model("deit_tiny_patch16_224", "gap", checkpoint_path=path, **SMALL)
    assert torch.equal(model.norm.weight, source.fc_norm.weight)
    assert torch.equal(model.norm.bias, source.fc_norm.bias)
    reason = "the file has it after the pooling (fc_norm), the model before"
    assert model.load_report.renamed == {"norm.weight": reason, "norm.bias": reason}
    # and back: the pretrained file of MAE into a network that normalizes the mean
    path = saved({"model": theirs().state_dict()}, tmp_path / "pretrained.pth")
    back: Any = create_model(f"timm/{TIMM}", "default", checkpoint_path=path, global_pool="avg", **SMALL)
    assert set(back.load_report.renamed) == {"fc_norm.weight", "fc_norm.bias"}
    same: Any = create_model(f"timm/{TIMM}", "gap", checkpoint_path=tmp_path / "mae.pth", global_pool="avg", **SMALL)
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(same.eval()(images), source(images), rtol=0, atol=1e-5)


def flax(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A network's weights under the names, and with the axes, of google-research/vision_transformer."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "pre_logits/kernel": np.zeros((dim, dim), np.float32),
    }
    for i in range(len(model.blocks)):
        own, their = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for n, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{their}LayerNorm_{n}/scale"] = state[f"{own}{norm}.weight"]
            arrays[f"{their}LayerNorm_{n}/bias"] = state[f"{own}{norm}.bias"]
        attention = f"{their}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * dim, (part + 1) * dim)
            weight = state[f"{own}attn.qkv.weight"][rows].T
            arrays[f"{attention}{name}/kernel"] = weight.reshape(dim, heads, dim // heads)
            arrays[f"{attention}{name}/bias"] = state[f"{own}attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{own}attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[f"{attention}out/bias"] = state[f"{own}attn.proj.bias"]
        for n in (1, 2):
            arrays[f"{their}MlpBlock_3/Dense_{n - 1}/kernel"] = state[f"{own}mlp.fc{n}.weight"].T
            arrays[f"{their}MlpBlock_3/Dense_{n - 1}/bias"] = state[f"{own}mlp.fc{n}.bias"]
    return arrays


@pytest.mark.parametrize("suffix", [".npz", ".NPZ"])
@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [
        (f"timm/{TIMM}", "default", {}),
        (f"timm/{TIMM}", "mpvg", {"readout": "method", "img_size": 64, "num_classes": 5}),
        ("deit_tiny_patch16_224", "default", {}),
        ("deit_tiny_patch16_224", "mpvg", {"img_size": 64}),
        ("deit_tiny_patch16_224", "gap", {"in_chans": 1}),
    ],
)
def test_an_archive_of_augreg_loads(
    name: str, method: str, changes: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    """As the same weights in a file of PyTorch's do."""
    source = theirs()
    with (tmp_path / f"augreg{suffix}").open("wb") as file:
        np.savez(file, **flax(source))
    torch.save(source.state_dict(), tmp_path / "augreg.pth")
    by_format = []
    for path in (tmp_path / f"augreg{suffix}", tmp_path / "augreg.pth"):
        torch.manual_seed(1)
        by_format.append(create_model(name, method, checkpoint_path=path, **(SMALL | changes)))
    archive, torchs = by_format
    assert unchanged(archive, torchs.state_dict())
    reports: list[Any] = [model.load_report for model in by_format]
    assert (reports[0].taken, reports[0].resampled, reports[0].new) == (
        *(reports[1].taken, reports[1].resampled, reports[1].new),
    )
    layer = {"pre_logits.fc.weight": "a layer before the head that newer networks do not have"}
    assert reports[0].dropped == reports[1].dropped | layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("embedding/kernel"), r"is a NumPy archive without embedding/kernel"),
        (
            lambda a: a.pop("Transformer/encoderblock_1/LayerNorm_0/bias"),
            r"does not fit, or is damaged",
        ),
        (lambda a: a.update({"Transformer/encoderblock_2/x": np.ones(1)}), r"it has 3 layers, the model 2"),
        (
            lambda a: a.update({"embedding/kernel": np.ones((8, 8, 3, 24))}),
            r"patches of \[8, 8\], the model 24 and \[16",
        ),
        (lambda a: a.update({"embedding/bias": np.array([Path()])}), r"Object arrays cannot be loaded"),
        (
            lambda a: a.update({"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": np.ones(8)}),
            r"is damaged: Dimension out of range",
        ),
    ],
)
def test_an_archive_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    arrays = flax(theirs())
    change(arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        create_model(f"timm/{TIMM}", checkpoint_path=tmp_path / "a.npz", **SMALL)


def test_an_archive_that_unpacks_to_many_times_its_size_is_refused_before_that(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **{"embedding/kernel": np.zeros((4000, 1000), np.float32)})
    with pytest.raises(ValueError, match=r"it unpacks to many times its size"):
        create_model(f"timm/{TIMM}", checkpoint_path=tmp_path / "a.npz", **SMALL)


@pytest.mark.parametrize("name", ["a.npz", "a.NPZ", "a.h5", "a.onnx", "a.msgpack", "a.gguf", "a.npy"])
def test_an_unreadable_kind_is_named_with_the_way_through_timm(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x89HDF" + bytes(100))
    with pytest.raises(ValueError, match=r"a\.\w+ is an? .*(timm\.create_model|use one|\.pth file|is damaged)"):
        load_checkpoint(create_model("swin_mini_patch2_28"), tmp_path / name)


def test_a_program_of_torchscript_is_named_with_the_way_through_timm(tmp_path: Path) -> None:
    """OpenAI's CLIP files are such programs. The archive's constants mark one."""
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version"):
            archive.writestr(f"clip/{name}", b"3\n")
    with pytest.raises(ValueError, match=r"clip\.pt is a TorchScript program, and no code in it was run; if timm can"):
        load_checkpoint(ours(), tmp_path / "clip.pt")


@pytest.mark.parametrize("name", ["a.SAFETENSORS", "a.Safetensors"])
def test_an_ending_is_read_in_any_case(name: str, tmp_path: Path) -> None:
    source, model = ours(), ours()
    save_file(source.state_dict(), tmp_path / name)
    load_checkpoint(model, tmp_path / name)
    assert unchanged(model, source.state_dict())
    assert read_tensors(tmp_path / name).keys() == source.state_dict().keys()


# ---- C6: channels


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 4), (3, 2), (1, 3), (4, 3), (3, 6)])
@pytest.mark.parametrize(
    ("name", "key", "sizes"),
    [
        (NAME, "patch_embed.proj.weight", {"depth": 1}),
        ("swin_mini_patch2_28", "patch_embed.proj.weight", {"depths": (1, 1)}),
        ("ceit_tiny_patch16_224", "patch_embed.proj.conv.weight", {"img_size": 32, "depth": 1}),
        (f"timm/{TIMM}", "patch_embed.proj.weight", {"img_size": 32, "depth": 1}),
    ],
)
def test_the_first_convolution_is_adapted_to_other_channels(
    name: str, key: str, sizes: dict[str, Any], old: int, new: int, tmp_path: Path
) -> None:
    """As in timm: to one channel by the sum, to others by repetition, scaled so that the sum over channels stays."""
    source = moved(create_model(name, "gap", in_chans=old, **sizes))
    path = saved(source.state_dict(), tmp_path / "a.pth")
    model: Any = create_model(name, "gap", in_chans=new, checkpoint_path=path, **sizes)
    given = source.state_dict()[key]
    repeated = given.repeat(1, -(-new // old), 1, 1)[:, :new] * (old / new)
    torch.testing.assert_close(model.state_dict()[key], given.sum(1, keepdim=True) if new == 1 else repeated)
    assert model.load_report.resampled == {key: f"from {old} to {new} channels, as timm does"}
    assert key not in model.load_report.taken


# ---- the report


def test_the_report_stays_with_the_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved({"net": ours("default").state_dict()}, tmp_path / "a.pth")
    assert ours().load_report is None
    with caplog.at_level(logging.INFO):
        model: Any = create_model(NAME, "mpvg", checkpoint_path=path, **TINY)
    assert caplog.records[-1].getMessage() == str(model.load_report)
    assert str(model.load_report).startswith(f"{path}, entry net, names of timm: ")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["x\ny", "x" * 5000])
def test_a_name_in_a_file_is_one_short_line_in_a_message(name: str, suffix: str, tmp_path: Path) -> None:
    """Of a tensor, of a set of weights that must be chosen, and in a header that is no header."""
    model = ours()
    state = model.state_dict()
    for content in (state | {name: torch.ones(1)}, {f"{n}{name}": state for n in range(9)}, name):
        path = tmp_path / f"a{suffix}"
        if suffix == ".pth":
            torch.save(content, path)
        else:
            header = json.dumps(name).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"a\.(pth|safetensors)") as refused:
            load_checkpoint(model, path)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("shape", [(), (8,), (1, 64), (1, 1, 1, 64)])
def test_a_leading_token_of_another_kind_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Found by fuzzing: the number of leading tokens was read from a shape that did not have it."""
    model = create_model("vit_mini_patch2_8", "default", num_classes=5, in_chans=1)
    state = model.state_dict() | {"cls_token": torch.ones(shape)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cls_token is"):
        create_model("vit_mini_patch2_8", "mpvg", num_classes=5, in_chans=1, checkpoint_path=tmp_path / "weights.pth")
