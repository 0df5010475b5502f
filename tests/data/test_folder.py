"""Folders of image files: transforms, workers, and every kind of bad input."""

import gc
import multiprocessing
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpvg.config import RunConfig
from mpvg.data import Batches, Data, Shard, make_preprocess, open_data, open_listing
from mpvg.runs import Run

CPU = torch.device("cpu")
Opener = Callable[..., Data]


@pytest.fixture
def open_images(image_folder: Path, make_config: Callable[..., RunConfig]) -> Opener:
    def opener(**options: object) -> Data:
        return open_data(make_config(image_folder, **{"img_size": 16, **options}), Shard(CPU))

    return opener


def read(batches: Batches[Any], epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(epoch))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    body = b"\x89PNG\r\n\x1a\n"
    for kind, values in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        body += struct.pack(">I", len(values)) + kind + values + struct.pack(">I", zlib.crc32(kind + values))
    return body


def test_workers_make_no_difference(open_images: Opener) -> None:
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "erase": 0.5}
    none, two = open_images(**options), open_images(workers=2, **options)
    for epoch in (0, 1):
        for ours, theirs in ((none.train, two.train), (none.val, two.val)):
            for a, b in zip(read(ours, epoch), read(theirs, epoch), strict=True):
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])


def test_stopping_early_leaves_the_next_pass_whole_and_no_process_behind(open_images: Opener) -> None:
    before = set(multiprocessing.active_children())
    data = open_images(workers=2, batch_size=2, hflip=0.5)
    expected = read(open_images(batch_size=2, hflip=0.5).train, 1)
    for _ in data.train.epoch(0):
        break
    started: Any = data.train.epoch(0, 3)
    next(started)
    started.close()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(read(data.train, 1), expected, strict=True))
    assert len(set(multiprocessing.active_children()) - before) == 2
    del data, started
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


def test_passes_cannot_overlap(open_images: Opener) -> None:
    train = open_images(batch_size=2).train
    first = train.epoch(0)
    next(first)
    next(train.epoch(1))
    with pytest.raises(RuntimeError, match="another pass over the same split was started"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_state_of_the_process_is_not_touched(open_images: Opener, workers: int) -> None:
    data = open_images(workers=workers, auto_augment="rand-m9-mstd0.5-inc1", erase=1.0)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    read(data.train)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_batches_do_not_depend_on_the_random_state(open_images: Opener) -> None:
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase": 1.0, "hflip": 0.5}
    first = read(open_images(**options).train)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    for a, b in zip(first, read(open_images(**options).train), strict=True):
        assert torch.equal(a[0], b[0])


def test_images_can_be_sent_to_a_spawned_worker(open_images: Opener, request: pytest.FixtureRequest) -> None:
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.5}
    expected = open_images(**options)
    sent = request.getfixturevalue("pickled")
    data = open_images(**options)
    for ours, theirs in ((data.train, expected.train), (data.val, expected.val)):
        for a, b in zip(read(ours), read(theirs), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
    assert len(sent) == 2


def test_classes_come_in_natural_order_with_their_images(image_folder: Path, open_images: Opener) -> None:
    for split in ("train", "val"):
        (image_folder / split / "a").rename(image_folder / split / "n10")
        (image_folder / split / "b").rename(image_folder / split / "n2")
        (image_folder / split / ".cache").mkdir()
        (image_folder / split / "readme.txt").write_text("no class")
    (image_folder / "train" / "c" / "._0.png").write_bytes(b"not an image")
    data = open_images()
    assert data.info.class_names == ("c", "n2", "n10")
    assert (data.info.train_size, data.info.val_size) == (24, 7)
    assert torch.cat([targets for _, targets in read(data.val)]).tolist() == [0] + 4 * [2] + 2 * [1]
    assert sorted(torch.cat([t for _, t in read(data.train)]).tolist()) == 6 * [0] + 8 * [1] + 10 * [2]


def test_val_may_lack_a_class(image_folder: Path, open_images: Opener) -> None:
    shutil.rmtree(image_folder / "val" / "a")
    assert torch.cat([targets for _, targets in read(open_images().val)]).tolist() == [1, 1, 2]


def test_images_in_deeper_folders_count(image_folder: Path, open_images: Opener) -> None:
    (image_folder / "val" / "a" / "b").mkdir()
    (image_folder / "val" / "a" / "0.png").rename(image_folder / "val" / "a" / "b" / "0.png")
    assert torch.cat([targets for _, targets in read(open_images().val)]).tolist() == 4 * [0] + 2 * [1] + [2]


def test_evaluation_is_deits(open_images: Opener, image_folder: Path) -> None:
    data = open_images(img_size=None)
    assert data.info.img_size == 224
    image = Image.open(image_folder / "val" / "a" / "1.JPG").convert("RGB")  # 29 x 21
    resized = image.resize((int(256 * 29 / 21), 256), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), 16
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float32) / 255
    expected = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    ours = make_preprocess(data.info)(image)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert torch.equal(ours, read(data.val)[0][0][1])


def test_training_without_augmentation_is_a_plain_resize(open_images: Opener, image_folder: Path) -> None:
    """Guards against what timm switches on by itself: color jitter, and a flip of one half."""
    for path in (image_folder / "train").rglob("*.*"):
        Image.new("RGB", (20, 20), (200, 100, 50)).save(path)
    images, _ = read(open_images(crop_scale=(1.0, 1.0)).train)[0]
    color = images.mean((0, 2, 3)) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    assert (255 * color - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 3
    assert images.std((2, 3)).max() < 0.02


@pytest.mark.parametrize("option", ["hflip", "erase", "auto_augment", "crop_scale"])
def test_each_option_reaches_timm(open_images: Opener, option: str) -> None:
    value: object = {"auto_augment": "rand-m9-inc1", "crop_scale": (0.1, 0.2)}.get(option, 1.0)
    plain = open_images(crop_scale=(1.0, 1.0))
    other = open_images(**{"crop_scale": (1.0, 1.0), option: value})
    assert not torch.equal(read(plain.train)[0][0], read(other.train)[0][0])


@pytest.mark.parametrize("text", ["nonsense", "rand-q3", "rand-m9-incx5"])
def test_auto_augment_that_timm_refuses(open_images: Opener, text: str) -> None:
    with pytest.raises(ValueError, match=f"augment.auto_augment is '{text}', which timm refuses .*rand-m9-mstd0.5"):
        open_images(auto_augment=text)


def test_missing_folder(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "no/such/folder"):
        with pytest.raises(FileNotFoundError, match=f"data folder '{name}' does not exist; give one with train/"):
            open_data(make_config(name), Shard(CPU))


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(image_folder: Path, open_images: Opener, split: str) -> None:
    shutil.rmtree(image_folder / split)
    with pytest.raises(FileNotFoundError, match=f"images/{split}' is missing; data need train/ and val/"):
        open_images()


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_class_folders(image_folder: Path, open_images: Opener, split: str) -> None:
    shutil.rmtree(image_folder / split)
    (image_folder / split).mkdir()
    Image.new("RGB", (9, 9)).save(image_folder / split / "loose.png")
    with pytest.raises(FileNotFoundError, match=f"images/{split}' has no class folders; put the images"):
        open_images()


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class(image_folder: Path, open_images: Opener, split: str) -> None:
    shutil.rmtree(image_folder / split / "b")
    (image_folder / split / "b").mkdir()
    (image_folder / split / "b" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"class folder '.*{split}/b' has no images \(.jpg.*\); fill it or remove it"):
        open_images()


def test_class_that_train_does_not_have(image_folder: Path, open_images: Opener) -> None:
    (image_folder / "val" / "c").rename(image_folder / "val" / "Z")
    with pytest.raises(ValueError, match=r"class 'Z' is in '.*val' but not in train; add its training images"):
        open_images()


def test_validation_alone_reads_nothing_of_train(
    image_folder: Path, make_config: Callable[..., RunConfig], open_val: Callable[..., Any]
) -> None:
    """A class that only train has keeps its number; without known classes train says what they are."""
    shutil.rmtree(image_folder / "val" / "a")
    config = make_config(image_folder, img_size=16)
    data = open_data(config, Shard(CPU))
    expected = read(data.val)
    assert open_listing(config, ("val",)).class_names == data.info.class_names
    shutil.rmtree(image_folder / "train")
    listing, val = open_val(config, data.info.class_names)
    assert listing.class_names == data.info.class_names == ("a", "b", "c")
    for (images, targets), (same, too) in zip(read(val), expected, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, too)
    with pytest.raises(FileNotFoundError, match=r"images/train' is missing"):
        open_listing(config, ("val",))


def test_training_alone_reads_nothing_of_val(image_folder: Path, make_config: Callable[..., RunConfig]) -> None:
    shutil.rmtree(image_folder / "val")
    for names in (None, ("a", "b", "c")):
        listing = open_listing(make_config(image_folder), ("train",), names)
        assert (listing.class_names, listing.val, len(listing.source("train"))) == (("a", "b", "c"), None, 24)


def test_a_run_refuses_classes_that_are_not_its_own(
    image_folder: Path, make_config: Callable[..., RunConfig], open_images: Opener
) -> None:
    """With the data's own names in their order; two known classes of one name fit no folder."""
    run = Run(Path("the run"), make_config(image_folder, img_size=16), open_images().info)
    assert len(run.validation(CPU)) == 1
    (image_folder / "val" / "b").rename(image_folder / "val" / "n10")
    (image_folder / "val" / "a").rename(image_folder / "val" / "n2")
    with pytest.raises(ValueError, match=r"has 3 classes \(c, n2, n10\), but the run was trained on 3 \(a, b, c\)"):
        run.validation(CPU)
    shutil.rmtree(image_folder / "val" / "n2")
    shutil.rmtree(image_folder / "val" / "n10")
    (image_folder / "val" / "c").rename(image_folder / "val" / "crane")
    cranes = replace(run, info=replace(run.info, class_names=("crane", "b", "crane")))
    with pytest.raises(ValueError, match=r"has 1 classes \(crane\), but the run was trained on 3 \(crane, b, crane\)"):
        cranes.validation(CPU)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("not an image"), "UnidentifiedImageError: cannot identify"),
    "empty": (lambda path: path.write_bytes(b""), "UnidentifiedImageError: cannot identify"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-400]), "OSError: .*truncated"),
    "bomb": (lambda path: path.write_bytes(png_header(60_000, 60_000)), "DecompressionBombError: .*3600000000 pixels"),
    "huge": (lambda path: path.write_bytes(png_header(11_000, 11_000)), "DecompressionBombWarning: .*121000000 pixels"),
    "long": (
        lambda path: path.write_bytes(png_header(60_000, 1)),
        "ValueError: 60000x1 is too elongated.*up to 1000",
    ),
    "postscript": (lambda path: Image.new("RGB", (9, 9)).save(path, format="EPS"), "UnidentifiedImageError"),
    "missing": (lambda path: path.unlink(), "FileNotFoundError: .*No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unreadable_image_is_named(image_folder: Path, open_images: Opener, damage: str) -> None:
    data = open_images()
    path = image_folder / "val" / "a" / "0.png"
    act, message = DAMAGE[damage]
    act(path)
    with pytest.raises(ValueError, match=rf"^image {path} cannot be read \({message}.*--loader.skip_corrupt true"):
        read(data.val)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_worker_failure_is_the_same_plain_message(
    image_folder: Path, open_images: Opener, split: str, workers: int
) -> None:
    path = image_folder / split / "a" / "0.png"
    path.write_text("not an image")
    data = open_images(workers=workers)
    cure = r"replace it, or skip such images with --loader\.skip_corrupt true"
    whole_message = rf"^image {path} cannot be read \(UnidentifiedImageError: [^\n]*; {cure}$"
    with pytest.raises(ValueError, match=whole_message):
        read(getattr(data, split))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_validation_images_are_left_out_and_counted(
    image_folder: Path, open_images: Opener, workers: int
) -> None:
    whole = torch.cat([images for images, _ in read(open_images().val)])
    for name in ("a/0.png", "a/1.JPG"):
        (image_folder / "val" / name).write_text("not an image")
    data = open_images(workers=workers, skip_corrupt=True, batch_size=2)
    batches = read(data.val)
    assert torch.equal(torch.cat([images for images, _ in batches]), whole[2:])
    assert torch.cat([targets for _, targets in batches]).tolist() == [0, 0, 1, 1, 2]
    assert data.val.skipped == 2
    read(data.val, 1)
    assert data.val.skipped == 2  # images, not readings
    assert data.train.skipped == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_training_images_are_replaced_by_the_next_readable(
    image_folder: Path, open_images: Opener, workers: int
) -> None:
    for n, path in enumerate(sorted((image_folder / "train" / "b").iterdir())):
        if n < 7:
            path.write_text("not an image")
        else:
            Image.new("RGB", (20, 20), "white").save(path)
    data = open_images(workers=workers, skip_corrupt=True)
    batches = read(data.train)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(targets) == 24
    assert sorted(targets.tolist()) == 10 * [0] + 8 * [1] + 6 * [2]
    white = (torch.ones(3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[targets == 1], white[:, None, None].expand(8, 3, 16, 16), atol=1e-4, rtol=0)
    assert data.train.skipped == 7
    again = read(open_images(skip_corrupt=True).train)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_last_training_image_is_replaced_by_the_first(image_folder: Path, open_images: Opener) -> None:
    last = max((image_folder / "train" / "c").iterdir())
    last.write_text("not an image")
    data = open_images(skip_corrupt=True)
    targets = torch.cat([targets for _, targets in read(data.train)])
    assert targets.bincount().tolist() == [11, 8, 5]  # with the image comes its own class
    assert data.train.skipped == 1


def test_training_set_without_any_readable_image(image_folder: Path, open_images: Opener) -> None:
    for path in (image_folder / "train").rglob("*.*"):
        path.write_text("not an image")
    with pytest.raises(ValueError, match=r"image .*train.* cannot be read"):
        read(open_images(skip_corrupt=True).train)


def test_wholly_unreadable_validation_batch_is_not_yielded(image_folder: Path, open_images: Opener) -> None:
    for path in (image_folder / "val" / "a").iterdir():
        path.write_text("not an image")
    data = open_images(skip_corrupt=True, batch_size=4)
    assert [len(targets) for _, targets in read(data.val)] == [3]
    assert data.val.skipped == 4
