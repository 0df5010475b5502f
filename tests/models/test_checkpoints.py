"""Weights from files: of a run, all of them or none; from elsewhere, with a report; and no file is executed."""

import argparse
import collections
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpvg.models import create_model, load_checkpoint
from mpvg.models.checkpoints import load_weights, read_tensors


def small(method: str = "mpvg", **kwargs: object) -> nn.Module:
    model = create_model("vit_mini_patch2_8", method, **{"depth": 2, "num_classes": 3, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("method", ["mpvg", "lape", "gap"])
def test_weights_survive_a_file(method: str, as_text: bool, tmp_path: Path) -> None:
    """Every tensor comes back bit for bit, through load_weights and through create_model."""
    path = tmp_path / "model.safetensors"
    saved = small(method)
    save_file(saved.state_dict(), path)
    given = str(path) if as_text else path

    loaded = small(method)
    assert not torch.equal(loaded.pos_embed, saved.pos_embed)
    load_weights(loaded, given)
    assert_unchanged(loaded, copied(saved))
    created = create_model("vit_mini_patch2_8", method, depth=2, num_classes=3, checkpoint_path=given)
    assert_unchanged(created, copied(saved))
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(created.eval()(image), saved.eval()(image))
    assert read_tensors(given).keys() == saved.state_dict().keys()


def without_a_key(tensors: dict[str, Tensor]) -> None:
    del tensors["delivery.last_norm.bias"]


def with_a_key_more(tensors: dict[str, Tensor]) -> None:
    tensors["cls_token"] = torch.zeros(1, 1, 64)


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["pos_embed"] = torch.zeros(1, 17, 64)


def with_everything_wrong(tensors: dict[str, Tensor]) -> None:
    for change in (without_a_key, with_a_key_more, with_another_shape):
        change(tensors)
    for name in ("weight", "bias"):
        tensors[f"head.{name}"] = tensors[f"head.{name}"][:2].clone()
    tensors["extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_key, r"another model or method: delivery\.last_norm\.bias is missing\. Use the model"),
        (with_a_key_more, r": cls_token has no place in the model\. Use"),
        (with_another_shape, r": pos_embed is \(1, 17, 64\), the model's is \(1, 16, 64\)\. Use"),
        (with_everything_wrong, r"is missing; .*no place in the model; .*; and 2 more\. Use"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    """What does not fit is named, and no tensor of the model has changed, not even one that fits."""
    path = tmp_path / "model.safetensors"
    tensors = copied(small())
    change(tensors)
    save_file(tensors, path)
    model = small()
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, name: str, tmp_path: Path) -> None:
    """From no byte at all to all but a few."""
    path = tmp_path / name
    model = small()
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    before = copied(model)
    for load in (load_weights, load_checkpoint):
        with pytest.raises(ValueError, match=rf"{name} is (damaged or not a|refused, and no code in it was run)"):
            load(model, path)
    assert_unchanged(model, before)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("writer", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_a_pickle_is_refused_without_being_executed(
    writer: Callable[[object, Path], object], name: str, tmp_path: Path
) -> None:
    """Whatever it is called, and also in the form that torch.save writes."""
    path, created = tmp_path / name, tmp_path / "created"
    writer({"pos_embed": Payload(created)}, path)
    message = (
        r"damaged or not a \.safetensors file" if name.endswith("safetensors") else r"is refused, and no code in it"
    )
    for load in (load_weights, load_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(small(), path)
    assert not created.exists()
    # The payload works: a reader that unpickles would have been caught.
    path = path.rename(tmp_path / "model.pickle")  # torch.load, too, goes by the name
    torch.load(path, weights_only=False) if writer is torch.save else pickle.loads(path.read_bytes())
    assert created.exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*; give a \.safetensors or \.pth file"):
        load_weights(small(), tmp_path / name)


def test_a_file_of_half_precision_keeps_the_models_precision(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: value.half() for key, value in small().state_dict().items()}, path)
    model = small()
    load_weights(model, path)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.pos_embed, load_file(path)["pos_embed"].float())


# ---- from another method, image size or number of classes


def started(model: nn.Module, into: str, path: Path, **kwargs: Any) -> tuple[nn.Module, Any]:
    """Saves a network and starts another from it; the other, and the report."""
    torch.save({"model": model.state_dict()}, path)
    other = small(into, **kwargs)
    return other, load_checkpoint(other, path)


def test_a_class_token_checkpoint_starts_a_network_with_a_mean(tmp_path: Path) -> None:
    """The token and its row go; every LN' is new, at 1 and 0 in a new network; all the rest is taken."""
    source = small("default")
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    model = create_model("vit_mini_patch2_8", "mpvg", depth=2, num_classes=3, checkpoint_path=tmp_path / "deit.pth")
    state, given = model.state_dict(), source.state_dict()
    assert torch.equal(state["pos_embed"], given["pos_embed"][:, 1:])
    for key, value in state.items():
        if key.startswith("delivery."):
            assert torch.equal(value, torch.full_like(value, key.endswith("weight"))), key
        elif key != "pos_embed":
            assert torch.equal(value, given[key]), key

    report = load_checkpoint(small("mpvg"), tmp_path / "deit.pth")
    assert set(report.dropped) == {"cls_token", "pos_embed[:, :1]"}
    assert set(report.new) == {key for key in state if key.startswith("delivery.")}
    assert set(report.taken) == {key for key in state if not key.startswith("delivery.")}
    assert not report.resampled
    assert "dropped: cls_token: the model reads out the mean" in str(report)
    assert "new: delivery.layer_norms.1.weight, " in str(report)


@pytest.mark.parametrize(
    ("saved", "into", "dropped", "new"),
    [
        ("mpvg", "pvg", {"delivery.last_norm.weight", "delivery.last_norm.bias"}, set()),
        ("pvg", "mpvg", set(), {"delivery.last_norm.weight", "delivery.last_norm.bias"}),
        ("lape_gap", "pvg", {"delivery.layer_norms.0.weight", "delivery.layer_norms.0.bias"}, set()),
        ("gap", "gap", set(), set()),
        ("lape", "lape", set(), set()),
    ],
)
def test_between_methods_each_layer_norm_goes_to_its_place(
    saved: str, into: str, dropped: set[str], new: set[str], tmp_path: Path
) -> None:
    source = small(saved)
    model, report = started(source, into, tmp_path / "model.pth")
    assert (set(report.dropped), set(report.new)) == (dropped, new)
    for key in report.taken:
        assert torch.equal(model.state_dict()[key], source.state_dict()[key]), key
    assert set(report.taken) | new == set(model.state_dict())


@pytest.mark.parametrize(("saved", "into"), [("default", "default"), ("default", "mpvg"), ("mpvg", "mpvg")])
def test_another_image_size_resamples_the_grid_and_leaves_the_class_row(saved: str, into: str, tmp_path: Path) -> None:
    source = small(saved)
    model, report = started(source, into, tmp_path / "model.pth", img_size=(12, 8))
    given, rows = source.pos_embed.detach(), int(saved == "default")
    grid = given[:, rows:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 4), mode="bicubic", antialias=True, align_corners=False)
    expected = grid.flatten(2).transpose(1, 2)
    if into == "default":
        expected = torch.cat([given[:, :1], expected], dim=1)
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert report.resampled == {"pos_embed": "from a grid of 4 x 4 to 6 x 4"}
    assert "pos_embed" not in report.taken


@pytest.mark.parametrize("classes", [0, 5])
def test_other_classes_leave_the_head_as_it_was_initialized(classes: int, tmp_path: Path) -> None:
    head = {"head.weight", "head.bias"}
    model, report = started(small(), "mpvg", tmp_path / "model.pth", num_classes=classes)
    assert set(report.dropped) == head
    assert set(report.new) == (head if classes else set())
    assert report.dropped["head.weight"] == (
        "3 classes in the file, 5 in the model" if classes else "the model has no head"
    )
    torch.save(model.state_dict(), tmp_path / "other.pth")
    back = load_checkpoint(small(), tmp_path / "other.pth")
    assert set(back.new) == head


def test_the_report_is_logged_and_is_a_warning_where_something_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        started(small("gap"), "gap", tmp_path / "model.pth")
        started(small("default"), "gap", tmp_path / "model.pth")
    same, changed = caplog.records
    assert (same.levelname, changed.levelname) == ("INFO", "WARNING")
    assert "31 tensors taken" in same.getMessage()
    assert "dropped: cls_token" in changed.getMessage()


# ---- the forms of files


def through(value: Any, path: Path) -> dict[str, Tensor]:
    torch.save(value, path)
    return read_tensors(path)


@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        (("model",), "model"),
        (("model", "model_ema"), "model"),  # DeiT evaluates what it trained
        (("state_dict", "state_dict_ema"), "state_dict_ema"),  # T2T-ViT and timm what they averaged
        (("state_dict",), "state_dict"),
        (("model_ema",), "model_ema"),
    ],
)
def test_weights_are_found_in_what_training_scripts_save(entries: tuple[str, ...], taken: str, tmp_path: Path) -> None:
    """Beside an optimizer's state, settings and numbers, with the prefixes that wrappers leave."""
    saved: dict[str, Any] = {name: {"module._orig_mod.w": torch.full((2,), n)} for n, name in enumerate(entries)}
    rest = {
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
    }
    found = through(saved | rest, tmp_path / "checkpoint.pth.tar")
    assert found.keys() == {"w"}
    assert torch.equal(found["w"], torch.full((2,), entries.index(taken)))


@pytest.mark.parametrize("core", [b"_core", b"core"])  # numpy 2 and 1
def test_numbers_of_numpy_beside_the_weights_are_read(core: bytes, tmp_path: Path) -> None:
    """As mmsegmentation's best score in `meta`."""
    file, written = tmp_path / "checkpoint.pth", tmp_path / "written.pth"
    torch.save({"meta": {"best": np.float64(0.4)}, "state_dict": {"w": torch.ones(1)}}, written)
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core.", b"numpy." + core + b"."))
    assert read_tensors(file).keys() == {"w"}


def test_a_state_dict_by_itself_is_read_as_it_is(tmp_path: Path) -> None:
    state = collections.OrderedDict({"module.w": torch.ones(1), "w": torch.zeros(1)})
    assert through(state, tmp_path / "model.bin").keys() == {"module.w", "w"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], r"contains a list without weights by name"),
        ({}, r"contains a dict without weights by name"),
        ({"epoch": 3}, r"its entry 'epoch' is a int; expected a state_dict, by itself or as one of state_dict_ema"),
        ({"state_dict": {"w": [1.0]}}, r"its entry 'w' is a list"),
        ({"w": torch.eye(2).to_sparse()}, r"its entry 'w' is a Tensor"),
        ({"w": torch.tensor([1.0, torch.nan])}, r"w has values that are not finite"),
        ({"w": torch.tensor([torch.inf])}, r"w has values that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_is_no_state_dict_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        through(value, tmp_path / "model.pth")


class Settings:
    """A class of a training script, in its checkpoints."""


def test_an_object_is_named_and_the_way_out_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it needs \S*Settings, .*safetensors\.torch\.save_file"):
        through({"model": {"w": torch.ones(1)}, "config": Settings()}, tmp_path / "model.pth")


# ---- the layouts of other repositories


def test_timms_own_file_of_deit_is_taken_whole(tmp_path: Path) -> None:
    theirs = timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    ours = create_model("deit_tiny_patch16_224", "default", depth=1, num_classes=3, checkpoint_path=path).eval()
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)


def test_lapes_norms_become_those_of_the_delivery(tmp_path: Path) -> None:
    """Ingrid725/LaPE keeps each LN' inside its block, as blocks.<i>.pe_norm."""
    source = small("lape")
    official = {
        key.replace("delivery.layer_norms.0", "blocks.0.pe_norm").replace(
            "delivery.layer_norms.1", "blocks.1.pe_norm"
        ): v
        for key, v in source.state_dict().items()
    }
    assert sum("pe_norm" in key for key in official) == 4
    torch.save({"model": official}, tmp_path / "lape.pth")
    model = small("lape")
    report = load_checkpoint(model, tmp_path / "lape.pth")
    assert_unchanged(model, copied(source))
    assert (report.source, report.dropped, report.new) == ("Ingrid725/LaPE", {}, {})
    # and into a method with a mean that does not serve layer 0
    dropped = load_checkpoint(small("mpvg"), tmp_path / "lape.pth").dropped
    assert set(dropped) == {
        *("cls_token", "pos_embed[:, :1]"),
        *("delivery.layer_norms.0.weight", "delivery.layer_norms.0.bias"),
    }


# ---- what is of another architecture


def with_another_grid(state: dict[str, Tensor]) -> None:
    state["pos_embed"] = torch.zeros(1, 15, 64)


def with_a_layer_more(state: dict[str, Tensor]) -> None:
    state |= {key.replace("blocks.1", "blocks.2"): value for key, value in state.items() if "blocks.1" in key}


def with_another_patch(state: dict[str, Tensor]) -> None:
    state["patch_embed.proj.weight"] = torch.zeros(64, 3, 4, 4)


def without_a_weight(state: dict[str, Tensor]) -> None:
    del state["blocks.1.mlp.fc1.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_another_grid,
            r"pos_embed has 15 rows, which is not a square grid plus 0 leading tokens, so it cannot be",
        ),
        (with_a_layer_more, r"blocks\.2\.norm1\.weight has no place in the model; .*and 8 more"),
        (with_another_patch, r"patch_embed\.proj\.weight is \(64, 3, 4, 4\), the model's is \(64, 3, 2, 2\)"),
        (without_a_weight, r"does not fit: blocks\.1\.mlp\.fc1\.weight is missing\. Use a checkpoint of this arch"),
    ],
)
def test_another_architecture_is_refused_whole(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    state = copied(small("gap"))
    change(state)
    torch.save(state, tmp_path / "model.pth")
    model = small("mpvg")
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, tmp_path / "model.pth")
    assert_unchanged(model, before)


@pytest.mark.parametrize("saved", ["gap", "mpvg"])
def test_a_class_token_is_not_made_up(saved: str, tmp_path: Path) -> None:
    torch.save(small(saved).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"cls_token is missing; pos_embed has no row for the model's class token"):
        load_checkpoint(small("default"), tmp_path / "model.pth")


def test_a_start_of_the_pe_and_a_checkpoint_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pos_std=1\.0 rescales a new PE, but .*model\.pth has a trained one"):
        create_model("vit_mini_patch2_8", pos_std=1.0, checkpoint_path=tmp_path / "model.pth")
