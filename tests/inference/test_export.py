"""`mpvg export`: what it writes, what it says, and what it refuses without leaving anything behind."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mpvg.inference.export as exporting
from mpvg.cli.export import FORMATS
from mpvg.cli.main import main
from mpvg.data import DataInfo, make_preprocess
from mpvg.inference import load_export
from mpvg.inference.backends import open_backend
from mpvg.inference.card import model_card
from mpvg.inference.export import export_run, new_folder
from mpvg.inference.loading import KINDS
from mpvg.inference.preprocessing import preprocessing
from mpvg.inference.quantization import int8_instruction
from mpvg.models.network import delivered_network
from mpvg.runs import Run, load
from mpvg.runs.checkpoints import Which


def export(run: Run, *arguments: str) -> int:
    return main(["export", str(run.path), *arguments])


def refused(run: Run, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses: one line, exit code 2, and nothing is left behind."""
    before = sorted(out.parent.iterdir())
    assert export(run, "--out", str(out), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mpvg: error: ")
    assert len(error.splitlines()) == 1
    assert sorted(out.parent.iterdir()) == before
    return error


def logits(run: Run, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run.model()(images)


# ---- each format


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("torch-export", "model.pt2"),
        ("openvino", "model.xml"),
        ("hub-folder", "model.safetensors"),
    ],
)
def test_a_run_is_exported_and_loaded(
    run: Run, kind: str, file: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, "--format", kind, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "weights: last, after epoch 1 of 1" in said
    assert "in a logit, on 5 validation images, as 1 x 1 x 8 x 8, 4 x 1 x 8 x 8" in said
    assert ("INFERENCE_PRECISION_HINT=f32" in said) == (kind == "openvino")
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    batch = torch.randn(3, 1, 8, 8)
    for path in (out, out / file):
        loaded = load_export(path)
        assert loaded.kind == kind
        torch.testing.assert_close(loaded(batch), logits(run, batch), rtol=0, atol=1e-4)
    array = loaded(batch.numpy())
    assert isinstance(array, np.ndarray)
    torch.testing.assert_close(torch.from_numpy(array), loaded(batch))
    assert loaded(batch[:0]).shape == (0, 10)
    assert loaded.preprocessing["class_names"] == [str(number) for number in range(10)]
    assert loaded.preprocessing["source"] == {
        "run": "run",
        "data": "digits",
        "checkpoint": "last",
        "averaged": False,
    }
    for wrong, message in (
        (batch.double(), r"images are float64 \(3, 1, 8, 8\); allowed: float32"),
        (torch.randn(3, 3, 8, 8), r"images are \(3, 8, 8\); allowed: 1 channels of 8 x 8"),
        (torch.randn(1, 1, 16, 8), "allowed: 1 channels of 8 x 8"),
        ([1], "images are list; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(wrong)
    assert refused_again(run, out, kind, capsys)


def refused_again(run: Run, out: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> bool:
    return f"{out} exists already; give another --out" in refused(run, out, capsys, "--format", kind)


def test_the_command_takes_what_can_be_loaded() -> None:
    assert FORMATS == KINDS


def test_a_hub_folder_has_a_card_that_says_what_is_known(run: Run, out: Path) -> None:
    export_run(run, out, "hub-folder", which="best")
    card = (out / "README.md").read_text()
    accuracy = run.metrics()[0]["accuracy"]
    for part in (
        "# vit_mini_patch2_8, method mpvg",
        "weights of the best checkpoint",
        "`digits`: 1,437 training and 360 validation images, as 1 x 8 x 8",
        "seed 0",
        f"| accuracy | {100 * accuracy:.2f} % |",
        "selected on this set",
        "## Licence",
        'timm.create_model("local-dir:PATH", pretrained=True)',
    ):
        assert part in card


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_card_knows_the_metrics_in_a_copy_that_followed_the_links(run: Run, tmp_path: Path, which: Which) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    card = model_card(load(tmp_path / "run"), 1, which=which, ema=False)
    assert f"| {100 * run.metrics()[0]['accuracy']:.2f} % |" in card


def test_the_card_of_weights_saved_within_an_epoch_has_no_metrics(run: Run, tmp_path: Path) -> None:
    """The ones of the epoch before are of other weights."""
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied, symlinks=True)
    lines = [line | {"step": line["step"] - 1} for line in run.metrics()]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "None: the weights were saved within an epoch." in model_card(load(copied), 1, which="last", ema=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("size", [[], ["--dynamic_size"]])
def test_eight_bits_are_measured_on_the_runs_data(
    run: Run, out: Path, size: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, "--format", "onnx", "--int8", "--out", str(out), *size) == 0
    said = capsys.readouterr().out
    assert "in a logit, on 5 validation images, as 1 x 1 x 8 x 8, 4 x 1 x 8 x 8" in said  # of the float32 graph
    assert f"instruction for 8-bit products: {int8_instruction() or 'none'}" in said
    before = 100 * run.metrics()[0]["accuracy"]
    assert f"int8: accuracy {before:.2f} % before, " in said
    whole = sum(tensor.numel() * 4 for tensor in run.model().parameters())
    assert (out / "model.onnx").stat().st_size < 0.5 * whole
    loaded, batch = load_export(out), torch.randn(4, 1, 8, 8)
    assert loaded.preprocessing["int8"] is True
    expected = logits(run, batch)
    difference = float((loaded(batch) - expected).abs().max())
    assert 0 < difference < 0.1 * float(expected.abs().max())
    if size:
        larger, network = torch.randn(2, 1, 16, 12), run.model()
        delivered_network(network).set_input_size((16, 12))
        with torch.no_grad():
            assert float((loaded(larger) - network(larger)).abs().max()) < 0.1 * float(expected.abs().max())


def test_a_torch_export_of_any_size(run: Run, out: Path) -> None:
    report = export_run(run, out, "torch-export", dynamic_size=True)
    assert report.batches == ((1, 1, 8, 8), (4, 1, 8, 8), (2, 1, 10, 4), (2, 1, 16, 16))
    assert report.difference < 1e-5
    loaded = load_export(out)
    assert loaded.preprocessing["multiple_of"] == [2, 2]
    assert loaded.preprocessing["folded"] is False
    assert loaded(torch.randn(1, 1, 20, 6)).shape == (1, 10)
    for size in ((9, 8), (2, 8)):
        with pytest.raises(ValueError, match="1 channels of multiples of 2 x 2, at least twice as much"):
            loaded(torch.randn(1, 1, *size))


def test_without_the_data_random_images_do(run: Run, out: Path) -> None:
    gone = replace(run, config=replace(run.config, data="nowhere"), info=replace(run.info, name="nowhere"))
    report = export_run(gone, out, "hub-folder")
    assert report.images.startswith("5 random images, because the validation set cannot be read (")


# ---- preprocessing is data


def prepare(values: dict[str, Any], image: Image.Image) -> Any:
    """What a script does that has Pillow and numpy alone."""
    image = image.convert("L" if values["channels"] == 1 else "RGB")
    width, height, side = *image.size, values["resize_to"]
    size = (side, side)
    if values["resize"] == "shorter side":
        short = min(width, height)
        size = side * width // short, side * height // short
    if size != image.size:
        image = image.resize(size, getattr(Image.Resampling, values["interpolation"].upper()))
    if values["crop"] is not None:
        left, top = (round((length - values["crop"]) / 2) for length in image.size)
        image = image.crop((left, top, left + values["crop"], top + values["crop"]))
    pixels = np.asarray(image, np.float32).reshape(values["height"], values["width"], -1).transpose(2, 0, 1)
    if values["mean_image"] is not None:
        pixels = pixels - np.array(values["mean_image"], np.float32).reshape(pixels.shape)
    mean, std = (np.array(values[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mean_image": tuple(float(number) for number in range(64))},
        {"name": "folder", "in_chans": 3, "img_size": 24, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
        {"name": "folder", "in_chans": 3, "img_size": 10, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    ],
)
def test_numpy_prepares_images_as_the_run_does(run: Run, changes: dict[str, Any]) -> None:
    info: DataInfo = replace(run.info, **changes)
    values = preprocessing(replace(run, info=info))
    values = json.loads(json.dumps(values))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    native = Image.fromarray(pixels)
    large = Image.fromarray(pixels).resize((31, 45), Image.Resampling.BICUBIC)
    for image in (native, large, large.convert("RGB")):
        expected = make_preprocess(info)(image).numpy()
        # Of named sets torch resizes, which rounds a pixel otherwise than Pillow here and there.
        steps = 0 if info.name == "folder" or image.size == native.size else 1.01
        np.testing.assert_allclose(prepare(values, image), expected, rtol=0, atol=1e-5 + steps / 255 / min(info.std))


# ---- refusals


def test_what_a_format_cannot_have_is_refused(run: Run, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(run, out, capsys, "--format", "onn")
    assert "unknown format 'onn'; did you mean onnx? Known: onnx, torch-export, openvino, hub-folder" in said
    assert "--int8 is for ONNX Runtime" in refused(run, out, capsys, "--format", "openvino", "--int8")
    assert "--dynamic_size is for graphs" in refused(run, out, capsys, "--format", "hub-folder", "--dynamic_size")


def test_a_run_that_is_none_or_of_a_newer_version_is_refused(
    run: Run, out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = replace(run, path=out.parent)
    assert "holds no run" in refused(empty, out, capsys, "--format", "onnx")
    newer = tmp_path / "newer"
    shutil.copytree(run.path, newer)
    text = (newer / "config.yaml").read_text()
    (newer / "config.yaml").write_text(text.replace("format: ", "format: 9", 1))
    assert "update mpvg" in refused(replace(run, path=newer), out, capsys, "--format", "onnx")
    assert "averaged weights need --ema_decay" in refused(run, out, capsys, "--format", "onnx", "--ema")


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_runtime_that_is_missing_is_named_with_its_command(
    run: Run,
    kind: str,
    package: str,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(run, out, capsys, "--format", kind)
    assert said.strip().endswith(f"{package} is not installed; it comes with: pip install 'mpvg[export]'")


def test_an_export_that_differs_leaves_nothing(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its parents had to be made."""

    class Other(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images) + 2e-4

    monkeypatch.setattr(exporting, "fold", Other)
    assert export(run, "--out", str(out / "deep" / "er"), "--format", "torch-export") == 2
    assert "the export differs from PyTorch by 2.0e-04 in a logit; allowed: 0.0001" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_appears_whole_or_not_at_all(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(out) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(out.parent.iterdir())
    with pytest.raises(OSError, match="make room, then give the same command again"), new_folder(out) as folder:
        raise OSError(28, "No space left on device")
    assert not list(out.parent.iterdir())
    with pytest.raises(FileExistsError, match="exists already"), new_folder(out) as folder:
        out.mkdir()
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_is_no_export_is_refused(run: Run, out: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_export(out)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.onnx").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="has no preprocess.json, which says how images are prepared"):
        load_export(bare / "model.onnx")
    values = preprocessing(run) | {"kind": "onnx", "file": "model.onnx"}
    for change, message in (
        ({"format": 99}, "has format 99, and this version of mpvg reads 1 to 1"),
        ({"format": "x"}, "has no format"),
        ({"kind": "tflite"}, "holds an export of kind 'tflite'; allowed: onnx, torch-export, openvino, hub-folder"),
        ({"file": "../model.onnx"}, "file is '../model.onnx'; allowed"),
        ({"mean": [0.1, 0.2]}, "sizes, mean and std do not fit"),
        ({"mean_image": [1.0]}, "mean_image has another size"),
        ({"resize": "longer side"}, "resize is 'longer side'; allowed: square, shorter side; export the run again"),
        ({"interpolation": "sharp"}, "interpolation is 'sharp'; allowed: nearest, nearest-exact, bilinear"),
        ({"resize_to": 10**9}, r"resize_to is 1000000000; allowed: 1 to \d+; export"),
        ({"resize": "shorter side", "crop": None}, r"crop is None; allowed: 1 to \d+; export"),
        ({"std": [0.0]}, "must be finite numbers, and std more than 0"),
        ({"mean": ["x"]}, "must be finite numbers, and std more than 0"),
        ({"class_names": [0] * 10}, "class_names must be texts"),
        ({"class_names": []}, "class_names must be texts, one or more, and none twice"),
        ({"class_names": ["a"] * 10}, "class_names must be texts, one or more, and none twice"),
        ({"orientation": "upside"}, "orientation is 'upside'; allowed: exif, stored"),
        ({"std": [1e-300]}, r"std is \[1e-300\]; allowed: numbers of at least 1e-06"),
        ({"task": "detection"}, "task is 'detection'; allowed: a task that names the class of an image"),
        ({"resize_to": None}, "resize_to is None; allowed: a whole number; export"),
        ({}, r"model.onnx cannot be loaded \("),
        ({"kind": "openvino"}, r"model.onnx cannot be loaded \(the file of openvino is model.xml"),
        ({"kind": "torch-export"}, r"model.onnx cannot be loaded \(the file of torch-export is model.pt2"),
        ({"multiple_of": -1}, "multiple_of is -1; allowed: null, or two whole numbers >= 1; export"),
        ({"format": -1}, "has format -1, and this version of mpvg reads 1 to 1"),
        ({"kind": "hub-folder"}, "is no hub folder: config.json is missing"),
    ):
        (bare / "preprocess.json").write_text(json.dumps(values | change))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_export(bare)
    (bare / "other.onnx").write_bytes(b"")
    (bare / "preprocess.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is not the network of .*, which is model.onnx; give the folder"):
        load_export(bare / "other.onnx")
    (bare / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="model.onnx is missing"):
        load_export(bare)
    (bare / "model.onnx").write_bytes(b"")
    (bare / "preprocess.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no preprocess.json, which says how images are prepared"):
        open_backend(bare)


def test_a_task_with_its_own_preparation_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "preprocess", lambda run: torch.nn.Identity())
    with pytest.raises(ValueError, match="'classification' prepares images in a way that preprocess.json cannot say"):
        preprocessing(run)


def test_the_processors_instructions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("flags : sse avx2 avx_vnni\n")
    assert int8_instruction(file) == "avx_vnni"
    file.write_text("flags : sse avx2\n")
    assert int8_instruction(file) is None
    assert int8_instruction(tmp_path / "none") is None


def test_wilsons_interval() -> None:
    from mpvg.statistics import proportion_interval

    low, high = proportion_interval(0.9, 100)
    assert math.isclose(low, 0.8256, abs_tol=1e-4)
    assert math.isclose(high, 0.9448, abs_tol=1e-4)
    assert proportion_interval(1.0, 10).high == 1.0
    assert proportion_interval(0.0, 10).low == 0.0
