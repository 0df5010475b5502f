"""Networks as objects that others handle: exporters, tracers, timm's factory, its hub folders and its helpers."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import timm.utils
import torch
from safetensors.torch import save_file
from timm.models import resolve_model_input_args, save_for_hf
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from torch import Tensor, nn

import mpvg.models
from mpvg.delivery import METHODS, DeliverySpec
from mpvg.models import create_model, model_names, pretrained_mean_std
from mpvg.models.convert import convert
from mpvg.models.fold import fold
from mpvg.models.network import count_parameters

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_mini_patch2_8", {"depth": 2, "embed_dim": 24, "num_heads": 2}),
    "Swin": ("swin_mini_patch2_28", {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)}),
    "CeiT": ("ceit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}),
    "T2T-ViT": ("t2t_vit_7", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}),
    "ViT-Lite": ("vit_lite_6_patch4_32", {"depth": 2, "embed_dim": 24, "num_heads": 2}),
    "timm": ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", ["mpvg", "default"])


def build(family: str, method: Any = "mpvg", **kwargs: Any) -> Any:
    """A small network in which no parameter is where it starts."""
    name, sizes = FAMILIES[family]
    return moved(create_model(name, method, **{"num_classes": 3, **sizes, **kwargs}))


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, model.in_chans, *model.patch_embed.img_size)


def equal(model: nn.Module, other: nn.Module) -> bool:
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


# ---- N2, N3, P6: exporters, empty batches, tracers


@pytest.mark.parametrize("folded", [False, True])
@every_family
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_the_exporter_that_traces_gives_onnx_runtime_the_same_network(family: str, folded: bool) -> None:
    model = build(family)
    model = fold(model) if folded else model
    batch, file = images(model), io.BytesIO()
    torch.onnx.export(model, (batch,), file, dynamo=False, input_names=["images"])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(batch), rtol=1e-4, atol=1e-5)


@every_method
@every_family
def test_a_batch_of_no_images_has_no_outputs(family: str, method: str) -> None:
    model = build(family, method)
    empty = images(model, 0)
    assert model(empty).shape == (0, 3)
    assert fold(model)(empty).shape == (0, 3)
    assert model.forward_features(empty).shape == (0, *model.forward_features(images(model, 1)).shape[1:])


@every_method
@every_family
def test_the_network_can_be_traced_by_torch_fx(family: str, method: str) -> None:
    """By torch's tracer and by timm's, which makes its feature extractors."""
    model = build(family, method)
    batch = images(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(batch), model(batch))
    last = get_graph_node_names(model)[1][-1]
    assert torch.equal(create_feature_extractor(model, return_nodes={last: "logits"})(batch)["logits"], model(batch))


def test_a_traced_t2t_still_checks_the_size_of_images() -> None:
    model = build("T2T-ViT")
    traced = torch.fx.symbolic_trace(model)
    for network in (model, traced):
        with pytest.raises(ValueError, match=r"images are 48 x 32, but the network takes 32 x 32"):
            network(torch.randn(1, 3, 48, 32))


# ---- N4: a conversion that delivers less than the method's name says


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        ("vit_small_patch14_dinov2", ""),
        (
            "vit_small_patch14_reg4_dinov2",
            "nothing is delivered to the Last LN, which is the method pvg_token, because",
        ),
        (
            "deit3_small_patch16_224",
            "nothing is delivered to the Last LN, which is the method pvg_token, because the cl",
        ),
        (
            "vit_medium_patch16_reg4_gap_256",
            "nothing is delivered to the Last LN, which is the method pvg, because it h",
        ),
        ("vit_tiny_patch16_224", ""),
    ],
)
def test_a_conversion_says_where_mpvg_is_pvg(name: str, remark: str, caplog: pytest.LogCaptureFixture) -> None:
    side = 28 if "patch14" in name else 32
    theirs = timm.create_model(name, img_size=side, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    with caplog.at_level(logging.WARNING):
        converted = convert(theirs, "mpvg")
    assert converted.remark.startswith(remark)
    assert bool(converted.remark) == bool(remark) == (converted.spec.last_index is None)
    assert [record.getMessage() for record in caplog.records] == ([f"{name}: {converted.remark}"] if remark else [])
    assert fold(converted).remark == converted.remark
    if remark:
        assert "readout='method' delivers to it" in converted.remark
        named = converted.remark.split(",")[1].removeprefix(" which is the method ")
        assert METHODS[named] == converted.spec
    caplog.clear()
    for method, readout in (("pvg", "keep"), ("mpvg", "method"), ("gap", "keep")):
        assert convert(theirs, method, readout=readout).remark == ""
    assert not caplog.records


def test_networks_of_this_package_do_what_the_method_says() -> None:
    assert {family: build(family).remark for family in FAMILIES} == dict.fromkeys(FAMILIES, "")


# ---- P1: configurations


@pytest.mark.parametrize("name", model_names())
def test_the_configuration_says_what_timm_asks_of_one(name: str) -> None:
    config = timm.get_pretrained_cfg(f"mpvg_{name}").to_dict()
    with torch.device("meta"):
        model: Any = create_model(name)
    assert config["fixed_input_size"]
    assert config["input_size"] == (3, *model.patch_embed.img_size)
    names = (config["first_conv"],) if isinstance(config["first_conv"], str) else config["first_conv"]
    assert all(isinstance(model.get_submodule(part), nn.Conv2d) for part in names)
    assert names == () or not name.startswith("t2t")
    assert config["pool_size"] == ((7, 7) if name.startswith("swin") else None)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "timm"])
def test_the_size_of_images_that_timms_scripts_are_given_reaches_the_network(family: str) -> None:
    """They ask the configuration whether the network takes an image size (`--img-size`)."""
    name, sizes = FAMILIES[family]
    side = 56 if family == "Swin" else 64
    arguments = resolve_model_input_args(f"mpvg_{name}", {"img_size": side, "in_chans": 1})
    model: Any = timm.create_model(**arguments, **{key: value for key, value in sizes.items() if key != "img_size"})
    assert model.patch_embed.img_size == (side, side)
    assert model(images(model)).shape == (2, 1000)


# ---- C7, P2, P8: weights through timm


@pytest.mark.parametrize("name", model_names())
def test_timm_says_that_there_are_no_weights_to_download(name: str) -> None:
    with torch.device("meta"):
        with pytest.raises(RuntimeError, match=r"No pretrained weights exist for mpvg_"):
            timm.create_model(f"mpvg_{name}", pretrained=True)
        with pytest.raises(ValueError, match=rf"mpvg_{name} has no pretrained weights to download; give checkpoint_pa"):
            create_model(name, pretrained=True)


DEIT: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}


def deit_file(path: Path, prefix: str = "") -> tuple[Any, Path]:
    theirs = moved(timm.create_model("deit_tiny_patch16_224", num_classes=3, **DEIT))
    torch.save({"model": {prefix + key: value for key, value in theirs.state_dict().items()}}, path)
    return theirs, path


@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize(("method", "size", "classes"), [("default", 32, 3), ("mpvg", 32, 3), ("pvg", 48, 7)])
def test_timm_takes_the_files_that_this_package_takes(
    method: str, size: int, classes: int, prefix: str, way: str, tmp_path: Path
) -> None:
    theirs, path = deit_file(tmp_path / "deit.pth", prefix)
    sizes = DEIT | {"img_size": size, "num_classes": classes}
    arguments: dict[str, Any] = {"checkpoint_path": path}
    if way != "checkpoint_path":
        arguments = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3}}
    torch.manual_seed(1)
    by_timm = timm.create_model("mpvg_deit_tiny_patch16_224", method=method, **arguments, **sizes)
    torch.manual_seed(1)
    by_us: Any = create_model("deit_tiny_patch16_224", method, checkpoint_path=path, **sizes)
    assert equal(by_timm, by_us)
    if method != "default":
        assert by_timm.load_report.dropped == by_us.load_report.dropped
    else:
        batch = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(by_timm.eval()(batch), theirs(batch), rtol=0, atol=1e-5)


def test_timm_refuses_a_file_of_another_network(tmp_path: Path) -> None:
    _, path = deit_file(tmp_path / "deit.pth")
    with pytest.raises(ValueError, match=r"does not fit: .*blocks\.2\.norm1\.weight is missing"):
        timm.create_model("mpvg_deit_tiny_patch16_224", checkpoint_path=path, **DEIT | {"depth": 3, "num_classes": 3})


def test_only_the_first_load_after_timms_factory_adapts(tmp_path: Path) -> None:
    """Afterwards, and in networks of create_model, load_state_dict is as strict as torch's."""
    theirs, path = deit_file(tmp_path / "deit.pth")
    loaded = timm.create_model("mpvg_deit_tiny_patch16_224", method="mpvg", checkpoint_path=path, num_classes=3, **DEIT)
    new = create_model("deit_tiny_patch16_224", "mpvg", num_classes=3, **DEIT)
    for model in (loaded, new):
        with pytest.raises(RuntimeError, match=r"Missing key.*delivery"):
            model.load_state_dict(theirs.state_dict())
    trained = timm.create_model("mpvg_deit_tiny_patch16_224", method="mpvg", num_classes=3, **DEIT)
    trained.load_state_dict(new.state_dict())
    assert equal(trained, new)


# ---- P3: the pooling


@pytest.mark.parametrize("method", ["mpvg", "default", "lape"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "timm"])
def test_the_methods_own_pooling_may_be_given(family: str, method: str) -> None:
    name, sizes = FAMILIES[family]
    model = build(family, method)
    again: Any = timm.create_model(f"mpvg_{name}", method=method, global_pool=model.global_pool, num_classes=3, **sizes)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(batch := images(model)), model(batch))
    with pytest.raises(ValueError, match=r"global_pool='max': the method decides it"):
        build(family, method, global_pool="max")


@every_method
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "timm"])
def test_without_pooling_the_tokens_come_out(family: str, method: str) -> None:
    """As with timm's networks; the read-out of CeiT is one vector in any case."""
    model = build(family, method, global_pool="", num_classes=0)
    pooled = build(family, method, num_classes=0)
    pooled.load_state_dict(model.state_dict())
    batch = images(model)
    torch.testing.assert_close(model(batch), pooled.forward_features(batch))
    model.reset_classifier(5)
    assert model(batch).shape == (*pooled.forward_features(batch).shape[:-1], 5)
    pooled.reset_classifier(0, "")
    torch.testing.assert_close(pooled(batch), pooled.forward_features(batch))


# ---- P4, P5: folders of save_for_hf


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("safe", [False, True])
@every_family
def test_a_folder_of_timms_loads_bit_for_bit(family: str, safe: bool, folded: bool, tmp_path: Path) -> None:
    model = build(family)
    model = fold(model) if folded else model
    save_for_hf(model, tmp_path, safe_serialization=safe)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again).__name__ == type(model).__name__
    assert equal(again, model)
    batch = images(model)
    assert torch.equal(again(batch), model(batch))
    assert again.spec == model.spec
    save_for_hf(again, tmp_path / "again")
    assert equal(timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True), model)


@pytest.mark.parametrize(
    "method", ["default", "lape", METHODS["mpvg_flat"], DeliverySpec(), {"first_layer": 0}, {}, METHODS["pvg_token"]]
)
@pytest.mark.parametrize("family", ["ViT", "timm"])
def test_a_method_in_any_form_is_saved(family: str, method: Any, tmp_path: Path) -> None:
    model = build(family, method, img_size=(32, 64) if family == "timm" else (4, 6))
    save_for_hf(model, tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert equal(again, model)
    assert again.spec == model.spec


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"readout": "method"}),
        ("vit_tiny_patch16_224", {"start": "preserve"}),
        ("vit_small_patch14_reg4_dinov2", {"start": "preserve"}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_base_patch16_siglip_224", {"readout": "method"}),
        ("vit_medium_patch16_reg4_gap_256", {"readout": "method"}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_a_converted_network_of_any_kind_is_saved(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    side = 42 if "patch14" in name else 48
    model = moved(create_model(f"timm/{name}", "mpvg", img_size=side, **sizes, **arguments))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert equal(again, model)
    assert torch.equal(again(batch := images(model)), model(batch))
    larger: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=2 * side)
    assert larger.patch_embed.img_size == (2 * side, 2 * side)


def test_a_network_at_another_size_is_saved_with_it(tmp_path: Path) -> None:
    for family in ("ViT", "T2T-ViT", "timm"):
        model = build(family)
        model.set_input_size(img_size=(64, 32))
        model.reset_classifier(5)
        save_for_hf(model, tmp_path / family)
        assert equal(timm.create_model(f"local-dir:{tmp_path / family}", pretrained=True), model)


def test_the_entry_for_converted_networks_is_no_model_of_its_own() -> None:
    assert "converted" not in model_names()
    with pytest.raises(ValueError, match=r"unknown model 'converted'"):
        create_model("converted")


# ---- P7: constants


def test_unfreezing_trains_no_constant_of_t2t() -> None:
    model = build("T2T-ViT")
    count, names = count_parameters(model), model.state_dict().keys()
    timm.utils.unfreeze(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    constants = {"pos_embed", "patch_embed.attention1.w", "patch_embed.attention2.w"}
    assert trained == names - constants
    model.set_input_size(img_size=64)
    timm.utils.unfreeze(model)
    assert constants.isdisjoint(name for name, _ in model.named_parameters())
    assert model.pos_embed.shape[1] == 16
    assert count_parameters(model) == count + 12 * 24
    assert count == sum(value.numel() for value in build("T2T-ViT").state_dict().values())


def test_files_with_the_constants_of_t2t_as_parameters_load(tmp_path: Path) -> None:
    """A state dict has the same names either way."""
    model = build("T2T-ViT")
    state = {key: nn.Parameter(value.clone(), requires_grad=False) for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "old.safetensors")
    again = build("T2T-ViT", checkpoint_path=tmp_path / "old.safetensors")
    assert model.state_dict().keys() == again.state_dict().keys()
    assert torch.equal(again.pos_embed, model.pos_embed)
    assert torch.equal(again.patch_embed.attention1.w, model.patch_embed.attention1.w)


# ---- C8: the normalization of weights


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("timm/vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm/vit_base_patch16_siglip_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm/vit_tiny_patch16_224.augreg_in21k", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm/deit_tiny_patch16_224", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("timm/vit_small_patch14_dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_the_normalization_of_timms_weights_is_known(
    name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    assert pretrained_mean_std(name) == (mean, std)
    found = pretrained_mean_std(name, in_chans=1)
    assert found is not None
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[sum(mean) / 3], [sum(std) / 3]]))


def test_the_normalization_in_a_folder_of_timms_is_read(tmp_path: Path) -> None:
    save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **DEIT), tmp_path, data_config={"mean": [0.1] * 3, "std": [0.2] * 3}
    )
    assert pretrained_mean_std(f"timm/local-dir:{tmp_path}") == ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_mini_patch2_8", "timm/no_such_network"])
def test_without_weights_of_timms_no_normalization_is_known(name: str) -> None:
    assert pretrained_mean_std(name) is None


# ---- P9: a script that does not know the names


def test_the_documented_line_makes_a_script_of_timms_know_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of docs/finetuning.md, with a script in place of timm's that does what they all begin with."""
    text = (Path(mpvg.models.__file__).parents[3] / "docs/finetuning.md").read_text()
    code = text.partition('python -c "')[2].partition('"')[0]
    script = tmp_path / "validate.py"
    script.write_text(
        "import sys, timm\nif __name__ == '__main__':\n    print(sys.argv[1:], timm.is_model(sys.argv[2]))\n"
    )
    monkeypatch.setattr("sys.argv", ["-c", str(script), "DATA", "mpvg_deit_tiny_patch16_224"])
    exec(compile(code, "line", "exec"), {})
    assert capsys.readouterr().out == "['DATA', 'mpvg_deit_tiny_patch16_224'] True\n"
