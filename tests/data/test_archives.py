"""Tar files and WebDataset shards: the same bits as the folder they were made of, each image once."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpvg.config import RunConfig
from mpvg.data import Data, Shard, open_data, open_listing
from mpvg.data.archives import archives
from mpvg.runs import Run

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def as_one_tar(folder: Path, root: Path) -> None:
    """train.tar and val.tar, with a folder a class inside."""
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(folder / split, arcname=".")


def as_shards_of_folders(folder: Path, root: Path) -> None:
    """train/0.tar ... with members in an order of their own."""
    for split in ("train", "val"):
        (root / split).mkdir()
        files = sorted((folder / split).rglob("*.*"), key=lambda path: path.stem)
        for number in range(3):
            with tarfile.open(root / split / f"{number}.tar", "w") as archive:
                for file in files[number::3]:
                    add(archive, f"{split}/{file.parent.name}/{file.name}", file.read_bytes())


def as_webdataset(folder: Path, root: Path) -> None:
    """train-000.tar ..., a number in a .cls beside each image, names in classes.txt."""
    (root / "classes.txt").write_text("a\nb\nc\n")
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.*"))
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard:03d}.tar", "w") as archive:
                for file in files[shard::2]:
                    key = f"{file.parent.name}-{file.stem}"
                    add(archive, f"{key}{file.suffix}", file.read_bytes())
                    add(archive, f"{key}.cls", str("abc".index(file.parent.name)).encode())


FORMS = [as_one_tar, as_shards_of_folders, as_webdataset]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def read(data: Data, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [*data.train.epoch(epoch, start), *data.val.epoch()]


@pytest.mark.parametrize(
    ("pipeline", "form"), [("timm", as_one_tar), ("fast", as_shards_of_folders), ("timm", as_webdataset)]
)
def test_archives_are_the_folder_they_were_made_of(
    pipeline: str, form: Callable[[Path, Path], None], image_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    """Order, augmentation and targets to the bit, from the middle of an epoch and with workers, too."""
    (root := tmp_path / "packed").mkdir()
    form(image_folder, root)
    options = {"img_size": 32, "hflip": 0.5, "erase": 0.5, "pipeline": pipeline}
    folder, packed = (open_data(make_config(path, **options), Shard(CPU)) for path in (image_folder, root))
    assert packed.info == replace(folder.info, name=str(root))
    assert packed.info.class_names == ("a", "b", "c")
    workers = open_data(make_config(root, workers=2, **options), Shard(CPU))
    for one, other in (
        (read(folder, 1), read(packed, 1)),
        (folder.train.epoch(1, 1), workers.train.epoch(1, 1)),
    ):
        for (images, targets), (same, too) in zip(one, other, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(targets, too)


def test_every_image_is_seen_once_by_two_processes(image_folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    (root := tmp_path / "packed").mkdir()
    as_shards_of_folders(image_folder, root)
    config = make_config(root, img_size=32, crop_scale=(1.0, 1.0))
    parts = [open_data(config, Shard(CPU, rank, 2)) for rank in range(2)]
    drawn = [image.numpy().tobytes() for data in parts for images, _ in data.train.epoch() for image in images]
    assert len(drawn) == len(set(drawn)) == 24
    scored = sorted(target for data in parts for _, targets in data.val.epoch() for target in targets.tolist())
    assert scored == [0] * 4 + [1] * 2 + [2]


@every_form
@pytest.mark.parametrize("corrupt", [False, True])
def test_validation_alone_reads_nothing_of_train(
    corrupt: bool,
    form: Callable[[Path, Path], None],
    image_folder: Path,
    tmp_path: Path,
    make_config: MakeConfig,
    open_val: Callable[..., Any],
) -> None:
    """A class that only train has keeps its number; without known classes train says what they are."""
    shutil.rmtree(image_folder / "val" / "a")
    (root := tmp_path / "packed").mkdir()
    form(image_folder, root)
    config = make_config(root, img_size=32)
    expected = list(open_data(config, Shard(CPU)).val.epoch())
    for path in archives(root, "train"):
        path.write_bytes(b"not a tar file") if corrupt else path.unlink()
    listing, val = open_val(config, ("a", "b", "c"))
    assert listing.class_names == ("a", "b", "c")
    for (images, targets), (same, too) in zip(val.epoch(), expected, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, too)
        assert targets.tolist() == [1, 1, 2]
    with pytest.raises((ValueError, FileNotFoundError), match=r"no tar file of train in|train\S*\.tar is damaged"):
        open_listing(config, ("val",))


def test_two_classes_of_one_name_keep_their_targets(
    image_folder: Path, tmp_path: Path, make_config: MakeConfig, open_val: Callable[..., Any]
) -> None:
    """As ImageNet's two cranes: a name does not say which of them an image is, its number does."""
    (root := tmp_path / "packed").mkdir()
    as_webdataset(image_folder, root)
    (root / "classes.txt").write_text("crane\nheron\ncrane\n")
    config = make_config(root, img_size=32)
    data = open_data(config, Shard(CPU))
    listing, val = open_val(config, data.info.class_names)
    assert listing.class_names == data.info.class_names == ("crane", "heron", "crane")
    for batches in (data.val, val):
        assert [targets.tolist() for _, targets in batches.epoch()] == [[0] * 4 + [1] * 2 + [2]]


@pytest.mark.parametrize("form", [as_one_tar, as_webdataset])
def test_a_run_refuses_classes_that_are_not_its_own(
    form: Callable[[Path, Path], None], image_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    (root := tmp_path / "packed").mkdir()
    form(image_folder, root)
    config = make_config(root, img_size=32)
    run = Run(Path("the run"), config, open_data(config, Shard(CPU)).info)
    assert len(run.validation(CPU)) == 1
    if form is as_one_tar:
        another_class_in_val(root)
    else:
        (root / "classes.txt").write_text("a\nb\nd\n")
    with pytest.raises(ValueError, match=r"classes \(a, b, (c, )?d\), but the run was trained on 3 \(a, b, c\)"):
        run.validation(CPU)


def cut_off(root: Path) -> None:
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[: len(content) // 2])


def no_tar(root: Path) -> None:
    (root / "train.tar").write_bytes(b"not a tar file" * 100)


def without_val(root: Path) -> None:
    (root / "val.tar").unlink()


def empty(root: Path) -> None:
    with tarfile.open(root / "train.tar", "w") as archive:
        add(archive, "readme.txt", b"nothing")


def without_a_class(root: Path) -> None:
    with tarfile.open(root / "train.tar", "a") as archive:
        add(archive, "loose.png", b"x")


def one_without_number(root: Path) -> None:
    with tarfile.open(root / "train.tar", "w") as archive:
        add(archive, "0.png", b"x")
        add(archive, "0.cls", b"0")
        add(archive, "1.png", b"x")


def another_class_in_val(root: Path) -> None:
    with tarfile.open(root / "val.tar", "a") as archive:
        add(archive, "d/0.png", b"x")


def names_too_few(root: Path) -> None:
    (root / "classes.txt").write_text("zero\n")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            add(archive, "0.png", b"x")
            add(archive, "0.cls", b"7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off, r"train\.tar (is cut off within|is damaged or not an uncompressed tar file)"),
        (no_tar, r"train\.tar is damaged or not an uncompressed tar file"),
        (without_val, r"no tar file of val in .*; give val\.tar, val-\*\.tar or val/\*\.tar"),
        (empty, r"the tar files of train in .* hold no images"),
        (without_a_class, r"loose\.png in .*train\.tar has no class"),
        (one_without_number, r"1\.png in .*train\.tar has no class: give every image a \.cls"),
        (another_class_in_val, r"class 'd' is in val but not in train"),
        (names_too_few, r"classes\.txt has 1 names, but there is a class 7"),
    ],
)
def test_what_cannot_be_read_is_refused(
    change: Callable[[Path], None], message: str, image_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    (root := tmp_path / "packed").mkdir()
    as_one_tar(image_folder, root)
    change(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data(make_config(root, img_size=32), Shard(CPU))


@pytest.mark.parametrize(
    ("split", "pipeline", "name", "content"),
    [
        ("train", "timm", "0.png", b"no image"),
        ("train", "fast", "1.JPG", b"\xff\xd8\xff\xe0"),
        ("val", "fast", "0.png", b"no image"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_its_archive(
    split: str, name: str, content: bytes, pipeline: str, image_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    (image_folder / split / "a" / name).write_bytes(content)
    (root := tmp_path / "packed").mkdir()
    as_one_tar(image_folder, root)
    options = {"img_size": 32, "pipeline": pipeline}
    message = rf"image \./a/{name} in \S*{split}\.tar cannot be read \(UnidentifiedImageError"
    with pytest.raises(ValueError, match=message):
        read(open_data(make_config(root, **options), Shard(CPU)))
    data = open_data(make_config(root, skip_corrupt=True, **options), Shard(CPU))
    assert len(read(data)) == 4
    assert data.train.skipped + data.val.skipped == 1
