"""Hub folders: timm, transformers and this package read the same network from them, and nothing in them is run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mpvg.inference.hub import read_hub_folder, write_hub_folder
from mpvg.models.fold import fold
from small_networks import FAMILIES, build, images

every_family = pytest.mark.parametrize("family", FAMILIES)


def prepared(model: Any) -> dict[str, Any]:
    height, width = model.patch_embed.img_size
    return {
        "channels": model.in_chans,
        "height": height,
        "width": width,
        "resize": "shorter side",
        "resize_to": 8 * height // 7,
        "crop": height,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "class_names": ["ant", "bee", "cat"],
    }


def equal(model: nn.Module, other: nn.Module) -> bool:
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build("ViT")
    write_hub_folder(model, tmp_path, prepared(model), "A card.\n")
    return tmp_path


@pytest.mark.parametrize("folded", [False, True])
@every_family
def test_timm_and_the_loader_read_the_same_bits(family: str, folded: bool, tmp_path: Path) -> None:
    model = build(family)
    model = fold(model) if folded else model
    write_hub_folder(model, tmp_path, prepared(model), "A card.\n")
    batch = images(model, 2)
    by_timm: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for again in (by_timm, read_hub_folder(tmp_path)):
        assert equal(again, model)
        assert torch.equal(again(batch), model(batch))
        assert not again.training
    assert by_timm.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert (tmp_path / "README.md").read_text() == "A card.\n"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@every_family
def test_transformers_reads_the_same_network(family: str, tmp_path: Path) -> None:
    """A folder as timm writes it cannot be read: the number of classes is given twice."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    model = build(family)
    write_hub_folder(model, tmp_path, prepared(model), "A card.\n")
    config = TimmWrapperConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    again: Any = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    batch = images(model, 2)
    assert equal(again.timm_model, model)
    with torch.no_grad():
        assert torch.equal(again(batch).logits, model(batch))


def test_a_folder_that_timm_wrote_is_read_too(tmp_path: Path) -> None:
    """Its config has the number of classes twice, which only transformers minds."""
    from timm.models import save_for_hf

    model = build("ViT-Lite")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert equal(read_hub_folder(tmp_path), model)


# ---- refusals


@pytest.mark.parametrize("name", ["modeling_vit.py", "sub/x.so", "pytorch_model.bin", "weights.PT", "run.sh"])
def test_a_folder_with_code_or_a_pickle_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("raise SystemExit")
    with pytest.raises(ValueError, match=f"holds code or a pickle, {name}, and nothing that comes with weights is run"):
        read_hub_folder(folder)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Net"}}, "names a module by its key 'auto_map'"),
        ({"pretrained_cfg": {"custom_load": "hf"}}, "names a module by its key 'custom_load'"),
        ({"model_args": {"norm_layer": {"_target_": "os"}}}, "names a module by its key '_target_'"),
        ({"model_args": {"depth": 10**6}}, "model_args has depth 1000000; allowed: at most 512; give another folder"),
        ({"model_args": {"depths": [2, 10**6]}}, "model_args has depths 1000000; allowed: at most 512"),
        ({"model_args": {"embed_dim": 1e30}}, r"model_args has embed_dim 1e\+30; allowed: at most 1,048,576"),
        ({"model_args": {"norm_layer": "os.system"}}, "model_args has 'os.system', which names a module or a file"),
        ({"model_args": {"method": "local-dir:x"}}, "model_args has 'local-dir:x', which names a module or a file"),
        ({"model_args": {"pretrained": True}}, "model_args has 'pretrained', which is no argument of a network"),
        ({"model_args": {"checkpoint_path": "x"}}, "model_args has 'checkpoint_path', which is no argument"),
        ({"model_args": {"no_such": 1}}, "mpvg_vit_mini_patch2_8 cannot be built .*no_such"),
        ({"model_args": {"method": "mpgv"}}, "cannot be built .*unknown method 'mpgv'"),
        ({"model_args": [1]}, r"model_args is \[1\]; allowed: dict"),
        ({"num_classes": "3"}, "num_classes is .3.; allowed: int"),
        ({"architecture": "resnet18"}, "unknown architecture 'resnet18'"),
        ({"architecture": "mpvg_vit_tiny_patch4_32"}, "unknown architecture|is of another model"),
    ],
)
def test_a_config_that_names_code_or_does_not_fit_is_refused(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    change(folder, **values)
    with pytest.raises(ValueError, match=message):
        read_hub_folder(folder)


def test_a_folder_without_its_parts_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not readable"):
        read_hub_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds no keys"):
        read_hub_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is no hub folder: config.json is missing"):
        read_hub_folder(folder)


def test_weights_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    change(folder, num_classes=5)
    with pytest.raises(ValueError, match="is of another model or method"):
        read_hub_folder(folder)


def test_a_network_without_a_name_has_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear was not made by mpvg.create_model"):
        write_hub_folder(nn.Linear(1, 1), tmp_path, {}, "")
