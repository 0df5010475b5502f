"""From a file to 8-bit pixels: the same for training, evaluation and predictions, by path and from bytes."""

import io
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hostile import exif, jpeg, smooth, with_exif
from mpvg.cli.main import main
from mpvg.config import ADDED_FIELDS, RunConfig
from mpvg.data import Data, Shard, make_preprocess, open_data
from mpvg.data import rules as untrusted
from mpvg.data.images import ImageFiles, read_image, read_pixels, to_8bit
from mpvg.recipes import RECIPES, paper

Opener = Callable[..., Data]
FORMAT_1 = Path(__file__).parents[1] / "fixtures" / "run-format-1"
READERS = (read_image, read_pixels)


def array(found: Image.Image | Tensor) -> np.ndarray:
    return np.asarray(found) if isinstance(found, Image.Image) else found.permute(1, 2, 0).numpy()


@pytest.fixture
def open_copies(tmp_path: Path, make_config: Callable[..., RunConfig]) -> Opener:
    """Opens a folder whose classes hold these files, in train and in val."""

    def opener(name: str, contents: list[bytes], suffix: str, *, pipeline: str, orientation: str = "exif") -> Data:
        for split in ("train", "val"):
            for label, part in (("a", contents[::2]), ("b", contents[1::2])):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True, exist_ok=True)
                for number, content in enumerate(part):
                    (folder / f"{number}{suffix}").write_bytes(content)
        made = make_config(tmp_path / name, batch_size=len(contents), img_size=16, pipeline=pipeline, hflip=0.5)
        return open_data(RunConfig.from_dict(made.to_dict() | {"orientation": orientation}), Shard(torch.device("cpu")))

    return opener


def assert_same_batches(ours: Data, theirs: Data) -> None:
    for name in ("train", "val"):
        pairs = zip(getattr(ours, name).epoch(0), getattr(theirs, name).epoch(0), strict=True)
        assert all(torch.equal(a.images, b.images) for a, b in pairs)


def png_of(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("pipeline", ["auto", "fast"])
def test_16_bit_gray_is_trained_and_validated_as_its_8_bit_picture(
    open_copies: Opener, pipeline: str, kind: str
) -> None:
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 65_536, (20, 24), dtype=np.uint16) for _ in range(4)]
    files = []
    for picture in values:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, kind)
        files.append(file.getvalue())
    suffix = {"PNG": ".png", "TIFF": ".tif", "PPM": ".pgm"}[kind]
    ours = open_copies("ours", files, suffix, pipeline=pipeline)
    rounded = [png_of(np.rint(picture / 257).astype(np.uint8)) for picture in values]
    assert_same_batches(ours, open_copies("theirs", rounded, ".png", pipeline=pipeline))


def test_preprocessing_takes_16_bits_like_any_other_mode(open_copies: Opener) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (20, 24), dtype=np.uint16)
    image, rounded = Image.fromarray(values), Image.fromarray(np.rint(values / 257).astype(np.uint8))
    info = open_copies("any", 4 * [png_of(np.zeros((9, 9), np.uint8))], ".png", pipeline="auto").info
    assert torch.equal(make_preprocess(info)(image), make_preprocess(info)(rounded))
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="values, of which the range is not known"):
            make_preprocess(info)(image.convert(mode))


def test_every_16_bit_value_is_rounded() -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for kind in ("<u2", ">u2"):
        found = np.asarray(to_8bit(Image.fromarray(values.astype(kind))))
        assert np.array_equal(found, [[round(int(value) / 257) for value in row] for row in values])


# ---- orientation


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("pipeline", ["auto", "fast"])
def test_orientation_is_heeded_in_training_and_validation(open_copies: Opener, pipeline: str, kind: str) -> None:
    picture = smooth(np.random.default_rng(0))
    files = [with_exif(picture, kind, exif(turn)) for turn in range(1, 9)]
    images = [Image.open(io.BytesIO(file)) for file in files]
    upright = [png_of(np.asarray(ImageOps.exif_transpose(image).convert("RGB"))) for image in images]
    stored = [png_of(np.asarray(image.convert("RGB"))) for image in images]
    suffix = f".{kind}"
    assert_same_batches(
        open_copies("ours", files, suffix, pipeline=pipeline), open_copies("up", upright, ".png", pipeline=pipeline)
    )
    assert_same_batches(
        open_copies("ours", files, suffix, pipeline=pipeline, orientation="stored"),
        open_copies("stored", stored, ".png", pipeline=pipeline),
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_heeded_by_path_from_a_file_and_from_bytes(
    tmp_path: Path, reader: Callable[..., Image.Image | Tensor], turn: int
) -> None:
    data = with_exif(smooth(np.random.default_rng(turn)), "jpeg", exif(turn))
    (tmp_path / "x.jpg").write_bytes(data)
    right = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    with (tmp_path / "x.jpg").open("rb") as opened:
        for file in (str(tmp_path / "x.jpg"), tmp_path / "x.jpg", opened, io.BytesIO(data)):
            assert np.array_equal(array(reader(file)), right)
    assert np.array_equal(array(reader(io.BytesIO(data), "stored")), np.asarray(Image.open(io.BytesIO(data))))


def test_orientation_is_found_behind_other_segments_and_padding() -> None:
    plain = jpeg(smooth(np.random.default_rng(0)))
    data = with_exif(smooth(np.random.default_rng(0)), "jpeg", exif(6))
    body = data[2 : len(data) - len(plain) + 2]
    right = np.asarray(Image.open(io.BytesIO(plain)).transpose(Image.Transpose.ROTATE_270))
    for before in (b"\xff\xe2\0\4ab", b"\xff\xfe\0\3c", b"\xff\xff", b"\xff\xe1\0\4xy", plain[2:20]):
        for reader in READERS:
            assert np.array_equal(array(reader(io.BytesIO(plain[:2] + before + body + plain[2:]))), right)


def test_orientation_is_part_of_what_is_trained(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("folder")
    values = config.to_dict()
    assert config.orientation == "exif"
    stored = RunConfig.from_dict(values | {"orientation": "stored"})
    assert stored.digest() != config.digest()
    del values["orientation"]
    assert RunConfig.from_dict(values) == stored, "runs made before the field existed"
    assert ADDED_FIELDS["orientation"] == "stored"
    with pytest.raises(ValueError, match="orientation is 'upright'; allowed: 'exif', 'stored'"):
        RunConfig.from_dict(values | {"orientation": "upright"})


def test_the_recipes_of_the_paper_read_as_torchvision_does() -> None:
    ours = {name for name, make in RECIPES.items() if make().orientation == "stored"}
    assert ours == {name for name, make in RECIPES.items() if make.__module__ == paper.__name__}


# ---- files that are none


@pytest.fixture
def special(tmp_path: Path) -> dict[str, str]:
    """Kind -> the path of what is no regular file."""
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        server.bind("socket.png")
        os.chdir(here)
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    kinds = {"folder": "folder", "pipe (FIFO)": "pipe", "socket": "socket"}
    found = {kind: str(tmp_path / f"{name}.png") for kind, name in kinds.items()}
    return found | {"device": "/dev/zero"}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(
    special: dict[str, str], reader: Callable[..., object]
) -> None:
    for kind, path in special.items():
        with pytest.raises(ValueError, match=re.escape(f"{path} is a {kind}, not a regular file; remove it")):
            reader(path)
    with pytest.raises(ValueError, match="is a pipe"):
        reader(special["pipe (FIFO)"].replace("pipe.png", "link.png"))


@pytest.mark.parametrize("pipeline", ["auto", "fast"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pipe_in_a_data_set_is_named(open_copies: Opener, tmp_path: Path, pipeline: str, split: str) -> None:
    data = open_copies("set", 4 * [png_of(np.zeros((9, 9), np.uint8))], ".png", pipeline=pipeline)
    path = tmp_path / "set" / split / "a" / "0.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=re.escape(f"image {path} cannot be read (ValueError: {path} is a pipe")):
        list(getattr(data, split).epoch(0))


@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_too_large_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[..., object]
) -> None:
    data = jpeg(smooth(np.random.default_rng(0)))
    path = tmp_path / "large.jpg"
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(6 * 2**30)
    with pytest.raises(ValueError, match=r"large.jpg has 6,442,450,944 bytes; allowed: at most 536,870,912"):
        reader(path)
    monkeypatch.setattr(untrusted, "MAX_BYTES", len(data))
    assert array(reader(io.BytesIO(data))).shape == (24, 32, 3)
    with path.open("rb") as file, pytest.raises(ValueError, match=f"more than {len(data):,} bytes"):
        reader(file)
    with pytest.raises(ValueError, match=f"more than {len(data):,} bytes"):
        reader(io.BytesIO(data + b"\0"))


# ---- predict


@pytest.fixture
def run(tmp_path: Path) -> str:
    shutil.copytree(FORMAT_1 / "run", tmp_path / "run", symlinks=True)
    return str(tmp_path / "run")


def test_predict_names_what_is_no_image(run: str, special: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for kind, path in special.items():
        assert main(["predict", run, path]) == 2
        if kind == "folder":
            assert f"folder {path} has no images; allowed endings: " in capsys.readouterr().err
            continue
        assert (
            f"image {path} cannot be read (ValueError: {path} is a {kind}, not a regular file; "
            in capsys.readouterr().err
        )


def test_predict_reads_as_the_run_does(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = smooth(np.random.default_rng(0), 8, 8)
    turned = np.rot90(picture)
    (tmp_path / "upright.png").write_bytes(png_of(turned))
    (tmp_path / "stored.png").write_bytes(png_of(picture))
    (tmp_path / "phone.png").write_bytes(with_exif(picture, "png", exif(8)))

    def said(name: str) -> list[str]:
        assert main(["predict", run, str(tmp_path / f"{name}.png")]) == 0
        return capsys.readouterr().out.splitlines()[2:]  # after the weights and the path

    assert said("upright") != said("stored")
    assert said("phone") == said("stored")  # the run is older than the field
    config = Path(run) / "config.yaml"
    config.write_text(f"orientation: exif\n{config.read_text()}")
    assert said("phone") == said("upright")


def test_predict_takes_16_bits(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (8, 8), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "wide.png")
    Image.fromarray(np.rint(values / 257).astype(np.uint8)).save(tmp_path / "narrow.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "unknown.tif")
    said = []
    for name in ("wide", "narrow"):
        assert main(["predict", run, str(tmp_path / f"{name}.png")]) == 0
        said.append(capsys.readouterr().out.splitlines()[2:])
    assert said[0] == said[1]
    assert main(["predict", run, str(tmp_path / "unknown.tif")]) == 2
    assert "unknown.tif cannot be read (ValueError: it holds 32-bit or signed values" in capsys.readouterr().err


# ---- images that are skipped


@pytest.mark.parametrize("pipeline", ["auto", "fast"])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_counted_and_named_once(
    image_folder: Path,
    make_config: Callable[..., RunConfig],
    capsys: pytest.CaptureFixture[str],
    workers: int,
    pipeline: str,
) -> None:
    corrupt = [image_folder / "train" / "a" / name for name in ("0.png", "1.JPG", "3.png")]
    for path in corrupt:
        path.write_text("no image")
    config = make_config(image_folder, img_size=16, workers=workers, skip_corrupt=True, pipeline=pipeline)
    data = open_data(config, Shard(torch.device("cpu")))
    for epoch in range(3):
        list(data.train.epoch(epoch))
        list(data.val.epoch(epoch))
    assert (data.train.skipped, data.val.skipped) == (3, 0)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split("image ")[1].split(" cannot")[0] for line in lines) == [str(path) for path in corrupt]
    assert all(line.startswith("mpvg: warning: ") and line.endswith("; skipped") for line in lines)


def test_a_resumed_pass_counts_each_image_once(image_folder: Path, make_config: Callable[..., RunConfig]) -> None:
    (image_folder / "train" / "a" / "0.png").write_text("no image")
    data = open_data(make_config(image_folder, img_size=16, skip_corrupt=True), Shard(torch.device("cpu")))
    data.train.unreadable.update({0, 20})
    list(data.train.epoch(1))
    assert (data.train.unreadable, data.train.skipped) == ({0, 20}, 2)


def test_of_many_skipped_images_the_first_are_named_and_the_others_counted(
    image_folder: Path, make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((image_folder / "train").rglob("*.*"))
    for path in files[:22]:
        path.write_text("no image")
    config = make_config(image_folder, img_size=16, skip_corrupt=True, batch_size=24)
    data = open_data(config, Shard(torch.device("cpu")))
    for epoch in range(2):
        list(data.train.epoch(epoch))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert len({line.split("image ")[1].split(" cannot")[0] for line in lines[:20]}) == 20
    assert lines[19].endswith("; skipped; further ones are counted, not named")
    assert lines[20] == "mpvg: warning: 22 images cannot be read and are skipped"


def test_names_that_are_printed_cannot_write_to_the_terminal(
    image_folder: Path, make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "val" / "a" / "\x1b[31m\nmpvg: done.png").write_text("no image")
    data = open_data(make_config(image_folder, img_size=16, skip_corrupt=True), Shard(torch.device("cpu")))
    list(data.val.epoch(0))
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert data.val.skipped == 1


def test_image_files_read_upright_unless_told_otherwise() -> None:
    assert ImageFiles.__dataclass_fields__["decode"].default is read_image
