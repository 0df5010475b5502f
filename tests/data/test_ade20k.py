"""ADE20K's layout: what is read, and what is refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hostile import HARMFUL
from mpvg.config import RunConfig
from mpvg.data import Listing, Shard, open_data, open_listing
from mpvg.data.ade20k import LabelMap
from mpvg.data.images import read_label_map
from mpvg.data.inventory import first_difference
from mpvg.data.label_maps import LabelBatch, SegmentationSizes, segmentation_pipeline
from mpvg.data.rules import say_once
from mpvg.data.types import DataInfo, Pipeline, Split
from scene_files import write_ade20k, write_image

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_line() -> None:
    """What is said once in a process is said once in each test."""
    say_once.cache_clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_ade20k(tmp_path / "data")


def listed(config: RunConfig, *splits: Split) -> Listing:
    return open_listing(config, splits or ("train", "val"))


def with_options(config: RunConfig, **options: Any) -> RunConfig:
    import dataclasses

    return dataclasses.replace(config, task_options=options)


def small_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
    return segmentation_pipeline(config, info, split, SegmentationSizes.fixed(32))


def stored(root: Path, split: str = "training", number: int = 0) -> Path:
    (found,) = (root / "annotations" / split).glob(f"*_{number}.png")
    return found


def test_zero_is_no_class_and_the_others_move_down(make_config: MakeConfig, root: Path) -> None:
    listing = listed(make_config(f"ade20k/{root}"))
    assert listing.class_names == ("1", "2", "3", "4")
    sample = listing.source("train").read(0)
    raw = np.asarray(Image.open(stored(root))).astype(int)
    assert np.array_equal(sample.target.labels, np.where(raw == 0, 255, raw - 1))
    assert sample.image.size == (48, 40)


def test_zero_may_be_a_class(make_config: MakeConfig, root: Path) -> None:
    pixels = np.array(Image.open(stored(root)))
    pixels[:5] = 255
    Image.fromarray(pixels).save(stored(root))
    listing = listed(with_options(make_config(f"ade20k/{root}"), reduce_zero_label=False))
    assert listing.class_names == ("0", "1", "2", "3", "4")
    assert np.array_equal(listing.source("train").read(0).target.labels, pixels)
    with pytest.raises(ValueError, match="task_options.reduce_zero_label is 1; allowed: true, false"):
        listed(with_options(make_config(f"ade20k/{root}"), reduce_zero_label=1))


def test_names_come_from_a_file(make_config: MakeConfig, root: Path) -> None:
    table = ["Idx\tRatio\tTrain\tVal\tName", *(f"{n}\t0.1\t10\t5\tthing, kind {n}" for n in range(1, 6))]
    (root / "objectInfo150.txt").write_text("\n".join(table) + "\n")
    assert listed(make_config(f"ade20k/{root}")).class_names == tuple(f"thing, kind {n}" for n in range(1, 6))
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfwall\r\nsky \r\nfloor\r\nroof\r\n\r\n")
    assert listed(make_config(f"ade20k/{root}"), "val").class_names == ("wall", "sky", "floor", "roof")
    for bad in (b"", b"a\x1b[2Jb\n", "für\n".encode("latin-1"), b"x\n" * 300, b"a" * 2**21):
        (root / "classes.txt").write_bytes(bad)
        with pytest.raises(ValueError, match=r"classes.txt|300 classes; allowed: 1 to 255"):
            listed(make_config(f"ade20k/{root}"))


def test_labels_beyond_the_classes_are_named(make_config: MakeConfig, root: Path) -> None:
    (root / "classes.txt").write_text("wall\nsky\n")
    data = open_data(make_config(f"ade20k/{root}", batch_size=1), Shard(CPU), small_pipeline)
    with pytest.raises(ValueError, match=r"_0.jpg cannot be read .*_0.png: .*it has the labels \[3, 4\]; there are 2"):
        list(data.val.epoch())
    config = make_config(f"ade20k/{root}", batch_size=1, skip_corrupt=True)
    data = open_data(config, Shard(CPU), small_pipeline)
    assert list(data.val.epoch()) == []
    assert data.val.skipped == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("images", r"1 label map has no image \(the first: ADE_train_1\)"),
        ("annotations", r"1 image has no label map \(the first: ADE_train_1\)"),
    ],
)
def test_files_without_the_other_are_named(
    make_config: MakeConfig, root: Path, kind: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    next((root / kind / "training").glob("*_1.*")).unlink()
    with pytest.raises(ValueError, match=f"{message}; mend the data, or leave these out"):
        listed(make_config(f"ade20k/{root}"))
    assert len(listed(make_config(f"ade20k/{root}", skip_corrupt=True)).source("train")) == 1
    assert "left out: 1 " in caplog.text


def test_odd_folders_are_refused(make_config: MakeConfig, root: Path, tmp_path: Path) -> None:
    write_image(root / "images" / "training" / "ADE_train_0.png", 48, 40)
    with pytest.raises(ValueError, match="has both"):
        listed(make_config(f"ade20k/{root}"))
    (root / "images" / "training" / "ADE_train_0.png").unlink()
    os.mkfifo(root / "annotations" / "training" / "ADE_train_7.png")
    with pytest.raises(ValueError, match="is a pipe"):
        listed(make_config(f"ade20k/{root}"))
    with pytest.raises(FileNotFoundError, match="is missing; data in ADE20K's layout have images/ and annotations/"):
        listed(make_config(f"ade20k/{tmp_path}"))
    with pytest.raises(ValueError, match="names no folder; give ade20k/<folder in its layout> or ade20k/canvas"):
        listed(make_config("ade20k"))


def test_gray_and_palette_are_labels_and_nothing_else_is(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    file = tmp_path / "map.png"
    Image.fromarray(labels).save(file)
    assert np.array_equal(read_label_map(file), labels)
    for bits in (4, 8):
        image = Image.fromarray(labels)
        image.putpalette(np.random.default_rng(0).integers(0, 256, 48, dtype=np.uint8).tobytes())
        image.save(file, bits=bits)
        assert np.array_equal(read_label_map(file), labels)
    for odd in (
        Image.fromarray(labels.astype(np.uint16)),
        Image.fromarray(np.repeat(labels[..., None], 3, 2)),
        Image.fromarray(labels > 5),  # of one bit, which PIL stretches
    ):
        odd.save(file)
        with pytest.raises(ValueError, match="a label map has 8 bits of gray, or a palette"):
            read_label_map(file)
    Image.fromarray(labels).save(file, "JPEG")
    with pytest.raises(OSError, match="a label map must be a PNG"):
        read_label_map(file)


@pytest.mark.parametrize("generate", HARMFUL, ids=lambda generate: generate.__name__)
@pytest.mark.parametrize("place", ["images", "annotations"])
def test_hostile_files_are_read_or_named(
    make_config: MakeConfig, root: Path, generate: Callable[..., Any], place: str
) -> None:
    case = generate(0, np.random.default_rng(0))
    (path,) = (root / place / "validation").glob("*_0.*")
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    path.write_bytes(case.data)
    if case.size is not None:
        os.truncate(path, case.size)
    limit = pytest.raises(ValueError, match=r"(more than|has) [\d,]+ bytes|_0.(jpg|png) cannot be read")
    good = place == "images" and case.picture is not None and case.picture.shape[:2] == (40, 48)
    if not good:
        with limit:
            list(open_data(make_config(f"ade20k/{root}", batch_size=1), Shard(CPU), small_pipeline).val.epoch())


def test_sizes_must_agree(make_config: MakeConfig, root: Path) -> None:
    data = open_data(make_config(f"ade20k/{root}", batch_size=1), Shard(CPU), small_pipeline)
    next((root / "images" / "validation").glob("*_1.jpg")).unlink()
    write_image(root / "images" / "validation" / "ADE_val_1.jpg", 20, 20)
    with pytest.raises(ValueError, match="_1.jpg cannot be read .*20x20 pixels, and its annotation is for 32x64"):
        list(data.val.epoch())


def test_the_hash_covers_the_label_maps(make_config: MakeConfig, root: Path) -> None:
    config = make_config(f"ade20k/{root}")
    before = listed(config).inventories["train"]
    assert listed(config).inventories["train"].hash == before.hash
    pixels = np.array(Image.open(stored(root, number=1)))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(stored(root, number=1))
    now = listed(config).inventories["train"]
    assert first_difference(before.packed, now) == "ADE_train_1.jpg has other annotations"


def test_workers_get_names_and_no_pixels(make_config: MakeConfig, root: Path) -> None:
    source = listed(make_config(f"ade20k/{root}")).source("train")
    assert len(pickle.dumps(source)) < 2000
    assert isinstance(pickle.loads(pickle.dumps(source)).read(1).target, LabelMap)


def test_evaluation_keeps_the_labels_own_size(make_config: MakeConfig, root: Path) -> None:
    data = open_data(make_config(f"ade20k/{root}", batch_size=2), Shard(CPU), small_pipeline)
    (batch,) = data.val.epoch()
    assert isinstance(batch, LabelBatch)
    assert [labels.shape for labels in batch.labels] == [(40, 48), (64, 32)]
    (batch,) = data.train.epoch()
    assert [labels.shape for labels in batch.labels] == [(32, 32)] * 2
    assert batch.images.shape == (2, 3, 32, 32)
