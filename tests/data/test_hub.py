"""Hugging Face data sets: the same bits as the folder of the same images, each row once, and what is refused."""

import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from torch import Tensor

from mpvg.config import RunConfig
from mpvg.data import Data, Shard, make_preprocess, open_data, open_listing, read_image
from mpvg.data.images import ImageFiles, read_pixels
from mpvg.data.inventory import first_difference

MakeConfig = Callable[..., RunConfig]
Opener = Callable[..., Data]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Offline, and with a cache of its own; both packages read their environment when they are imported."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def rows(image_folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Columns image and label of the splits, in the order in which the folder is listed."""
    columns: dict[str, dict[str, list[Any]]] = {}
    for split, name in (("train", "train"), ("val", "validation")):
        files = sorted((image_folder / split).rglob("*.*"))
        images = [{"bytes": file.read_bytes(), "path": None} for file in files]
        columns[name] = {"image": images, "label": ["abc".index(file.parent.name) for file in files]}
    return columns


def write(root: Path, rows: dict[str, dict[str, list[Any]]], **features: Any) -> Path:
    """Writes the splits as the hub lays them out; features other than images and the labels' ClassLabel are given."""
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])} | features
    (root / "data").mkdir(parents=True)
    for split, columns in rows.items():
        table = datasets.Dataset.from_dict(columns)
        for column in columns:
            table = table.cast_column(column, kinds[column]) if kinds.get(column) else table
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def open_rows(tmp_path: Path, rows: dict[str, dict[str, list[Any]]], make_config: MakeConfig) -> Opener:
    """Opens a data set of the rows, however a test has changed them, or of another folder."""

    def opener(root: Path | None = None, *, rank: int = 0, world_size: int = 1, **options: Any) -> Data:
        features = {name: options.pop(name) for name in ("image", "label", "mask") if name in options}
        if root is None and not (tmp_path / "set").exists():
            write(tmp_path / "set", rows, **features)
        config = make_config(f"hfds/{root or tmp_path / 'set'}", **{"img_size": 32, **options})
        return open_data(config, Shard(CPU, rank, world_size))

    return opener


def read(data: Data, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [*data.train.epoch(epoch, start), *data.val.epoch()]


def assert_same(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    for (images, targets), (same, too) in zip(some, others, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, too)


@pytest.mark.parametrize(("pipeline", "form"), [("timm", "parquet"), ("fast", "parquet"), ("fast", "folder")])
def test_rows_are_the_folder_of_the_same_images(
    pipeline: str, form: str, image_folder: Path, open_rows: Opener, make_config: MakeConfig
) -> None:
    """Order, augmentation and targets to the bit, from the middle of an epoch and with workers, too."""
    options = {"img_size": 32, "hflip": 0.5, "erase": 0.5, "pipeline": pipeline}
    folder = open_data(make_config(image_folder, **options), Shard(CPU))
    root = image_folder if form == "folder" else None  # of a folder, tables hold names, not bytes
    table, workers = open_rows(root, **options), open_rows(root, workers=2, **options)
    assert table.info == replace(folder.info, name=table.info.name)
    assert table.info.class_names == ("a", "b", "c")
    assert_same(read(folder, 1), read(table, 1))
    assert_same(list(folder.train.epoch(1, 1)), list(workers.train.epoch(1, 1)))


def test_every_row_is_seen_once_by_two_processes(open_rows: Opener) -> None:
    parts = [open_rows(rank=rank, world_size=2, crop_scale=(1.0, 1.0)) for rank in range(2)]
    drawn = [image.numpy().tobytes() for data in parts for images, _ in data.train.epoch() for image in images]
    assert len(drawn) == len(set(drawn)) == 24
    scored = sorted(target for data in parts for _, targets in data.val.epoch() for target in targets.tolist())
    assert scored == [0] * 4 + [1] * 2 + [2]


def test_images_can_be_sent_to_a_spawned_worker(open_rows: Opener, request: pytest.FixtureRequest) -> None:
    expected = read(open_rows())
    sent = request.getfixturevalue("pickled")
    assert_same(read(open_rows()), expected)
    assert len(sent) == 2
    assert max(sent) < 20_000  # where the tables lie, not what they hold


def test_it_is_kept_where_the_loader_is_told(
    tmp_path: Path, rows: dict[str, dict[str, list[Any]]], make_config: MakeConfig, cache: Path
) -> None:
    data = f"hfds/{write(tmp_path / 'set', rows)}"
    open_data(make_config(data, root=tmp_path / "mine"), Shard(CPU))
    assert list((tmp_path / "mine").rglob("*.arrow"))
    assert not list(cache.rglob("*.arrow"))
    open_data(make_config(data), Shard(CPU))
    assert list(cache.rglob("*.arrow"))


def test_other_columns_are_not_read(rows: dict[str, dict[str, list[Any]]], open_rows: Opener) -> None:
    expected = len(rows["train"]["label"])
    for columns in rows.values():
        columns["mask"] = [{"bytes": b"no image", "path": None} for _ in columns["label"]]
    assert sum(len(targets) for _, targets in open_rows(mask=datasets.Image()).train.epoch()) == expected


@pytest.mark.parametrize("names", [("validation", "test"), ("val", "test"), ("test",)])
def test_the_split_that_is_held_out(
    names: tuple[str, ...], rows: dict[str, dict[str, list[Any]]], tmp_path: Path, make_config: MakeConfig
) -> None:
    held_out, train = rows.pop("validation"), rows["train"]
    rows |= dict.fromkeys(names, train) | {names[0]: held_out}
    write(tmp_path / "set", rows)
    assert open_data(make_config(f"hfds/{tmp_path / 'set'}"), Shard(CPU)).info.val_size == 7


def test_whole_numbers_are_classes_named_by_themselves(
    rows: dict[str, dict[str, list[Any]]], open_rows: Opener
) -> None:
    for columns in rows.values():
        columns["label"] = [(2, 10, 300)[label] for label in columns["label"]]
    data = open_rows(label=datasets.Value("uint16"))
    assert data.info.class_names == ("2", "10", "300")
    assert torch.cat([targets for _, targets in data.val.epoch()]).tolist() == [0] * 4 + [1] * 2 + [2]
    assert torch.cat([targets for _, targets in data.train.epoch()]).bincount().tolist() == [10, 8, 6]


def test_preprocess_is_what_validation_does(image_folder: Path, open_rows: Opener) -> None:
    data = open_rows()
    files = sorted((image_folder / "val").rglob("*.*"))
    expected = torch.stack([make_preprocess(data.info)(read_image(str(file))) for file in files])
    assert torch.equal(expected, torch.cat([images for images, _ in data.val.epoch()]))


DAMAGE: dict[str, tuple[Any, str]] = {
    "text": ({"bytes": b"not an image", "path": None}, "UnidentifiedImageError"),
    "no bytes": ({"bytes": b"", "path": "0.png"}, "UnidentifiedImageError"),
    "marker": ({"bytes": b"\xff\xd8\xff\xe0", "path": None}, "UnidentifiedImageError"),
    "empty": (None, "ValueError: it has neither bytes nor a path"),
}


@pytest.mark.parametrize(("split", "pipeline"), [("train", "fast"), ("validation", "timm")])
def test_an_image_that_cannot_be_read_is_named_or_left_out(
    split: str, pipeline: str, rows: dict[str, dict[str, list[Any]]], open_rows: Opener
) -> None:
    rows[split]["image"][3], message = DAMAGE["text"]
    with pytest.raises(ValueError, match=rf"^image in row 3 of {split} of hfds/\S* cannot be read \({message}"):
        read(open_rows(pipeline=pipeline))
    data = open_rows(pipeline=pipeline, skip_corrupt=True, workers=1)
    assert len(read(data)) == 4
    assert data.train.skipped + data.val.skipped == 1


def test_every_damage_of_a_row_is_seen_by_both_decoders(
    rows: dict[str, dict[str, list[Any]]], tmp_path: Path, make_config: MakeConfig
) -> None:
    rows["train"]["image"][: len(DAMAGE)] = [image for image, _ in DAMAGE.values()]
    source = open_listing(make_config(f"hfds/{write(tmp_path / 'set', rows)}")).train
    assert isinstance(source, ImageFiles)
    for decode in (read_image, read_pixels):
        for index, (_, message) in enumerate(DAMAGE.values()):
            with pytest.raises((OSError, ValueError)) as error:
                replace(source, decode=decode).read(index)
            assert f"{error.type.__name__}: {error.value}".startswith(message)
        assert replace(source, decode=decode).read(len(DAMAGE)).target == 0


def test_a_file_of_a_row_that_has_gone_is_named(image_folder: Path, open_rows: Opener) -> None:
    data = open_rows(image_folder)
    (image_folder / "val/a/0.png").unlink()
    with pytest.raises(ValueError, match=r"^image in row 0 of validation of .* \(FileNotFoundError: .*val/a/0\.png'"):
        read(data)


def without(column: str) -> Callable[[dict[str, Any]], object]:
    return lambda rows: [columns.pop(column) for columns in rows.values()]


def label(split: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda rows: rows[split]["label"].__setitem__(3, value)


def every(column: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda rows: [columns.update({column: [value] * len(columns["label"])}) for columns in rows.values()]


INTEGER = datasets.Value("int64")


@pytest.mark.parametrize(
    ("change", "features", "message"),
    [
        (lambda rows: rows.pop("train"), {}, r"has the splits validation; needed: train, and one of valid"),
        (lambda rows: rows.pop("validation"), {}, r"has the splits train; .*one of validation, val, test; rename"),
        (without("image"), {}, r"data 'hfds/\S*' has no column 'image', but label; rename the right one"),
        (without("label"), {}, r"has no column 'label', but image; rename the right one to 'label'"),
        (every("image", "a.png"), {"image": None}, r"column 'image' of data \S* holds Value\('string'\), not images"),
        (every("label", "a"), {"label": None}, r"column 'label' of split 'train' .* holds Value\('string'\), .*whole"),
        (every("label", 1.5), {"label": None}, r"column 'label' .* holds Value\('float64'\), .*allowed: a ClassLabel"),
        (label("train", None), {"label": INTEGER}, r"'train' of .*Value\('int64'\), 1 of 24 empty; allowed: .*every"),
        (label("validation", None), {}, r"'label' of split 'validation' of data .*, 1 of 7 empty; allowed"),
        (
            label("validation", -1),
            {},
            r"label -1 is in split 'validation' of data .*, but .* the 3 classes; give every",
        ),
        (label("validation", 7), {"label": INTEGER}, r"label 7 is in split 'validation' .* among the 3 classes"),
    ],
)
def test_what_is_no_set_of_labelled_images_is_refused(
    change: Callable[[Any], object],
    features: dict[str, Any],
    message: str,
    rows: dict[str, dict[str, list[Any]]],
    open_rows: Opener,
) -> None:
    change(rows)
    with pytest.raises(ValueError, match=message):
        open_rows(**features)


@pytest.mark.parametrize("name", ["nobody/nothing", "{folder}/nowhere", "{folder}/empty"])
def test_a_set_that_is_not_there(name: str, tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "empty").mkdir()
    data = f"hfds/{name.format(folder=tmp_path)}"
    message = rf"data '{data}' cannot be loaded \(\w*Error: .*hfds/<name> of a set .*offline.*or hfds/<folder>"
    with pytest.raises(FileNotFoundError, match=message):
        open_data(make_config(data), Shard(CPU))


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "script.py"])
def test_a_set_that_is_damaged_or_a_program(
    name: str, tmp_path: Path, rows: dict[str, dict[str, list[Any]]], open_rows: Opener
) -> None:
    root = write(tmp_path / "script", rows)
    (root / name).write_text("raise SystemExit\n")
    with pytest.raises(ValueError, match=r"data 'hfds/\S*script' cannot be loaded \((ArrowInvalid|RuntimeError): "):
        open_rows(root)


def test_without_datasets(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"data 'hfds/mnist' needs datasets .*pip install 'mpvg\[data\]'"):
        open_data(make_config("hfds/mnist"), Shard(CPU))


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_a_share_of_train_is_held_out_where_there_is_no_other_split(
    form: str, rows: dict[str, dict[str, list[Any]]], tmp_path: Path, image_folder: Path, make_config: MakeConfig
) -> None:
    del rows["validation"]
    shutil.rmtree(image_folder / "val")
    config = make_config(f"hfds/{write(tmp_path / 'set', rows) if form == 'parquet' else image_folder}")
    with pytest.raises(ValueError, match=r"has the splits train; .*--val_share 0\.1 holds out a share of train"):
        open_listing(config)
    config = replace(config, val_share=0.3)
    listing = open_listing(config)
    assert listing.train
    assert listing.val
    both = [(source.read(i), source.name(i)) for source in (listing.train, listing.val) for i in range(len(source))]
    assert sorted(name for _, name in both) == sorted(f"in row {row} of train of {config.data}" for row in range(24))
    for sample, name in both:
        row = int(name.split()[2])
        assert sample.target == rows["train"]["label"][row]
        expected = read_image(io.BytesIO(rows["train"]["image"][row]["bytes"]))
        assert sample.image.tobytes() == expected.tobytes()
    assert {0, 1, 2} == {int(listing.val.read(i).target) for i in range(len(listing.val))}
    alone = open_listing(config, ("val",), listing.class_names)
    assert alone.inventories["val"] == listing.inventories["val"]


def test_a_share_beside_a_validation_split_is_refused(
    rows: dict[str, dict[str, list[Any]]], tmp_path: Path, make_config: MakeConfig
) -> None:
    config = replace(make_config(f"hfds/{write(tmp_path / 'set', rows)}"), val_share=0.3)
    with pytest.raises(ValueError, match=r"val_share is 0\.3, but data 'hfds/.*' have a validation split of their own"):
        open_listing(config)


@pytest.mark.parametrize("names", [["a"], None])
def test_a_single_class_is_refused(
    names: list[str] | None, rows: dict[str, dict[str, list[Any]]], open_rows: Opener
) -> None:
    for columns in rows.values():
        columns["label"] = [0] * len(columns["label"])
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    with pytest.raises(ValueError, match=r"data 'hfds/.*' has one class only, '[a0]', and a classifier needs two; "):
        open_rows(label=feature)


def test_two_spellings_of_one_class_are_told_apart(rows: dict[str, dict[str, list[Any]]], open_rows: Opener) -> None:
    with pytest.raises(ValueError, match=r"spelled differently in Unicode: 'caf\\xe9' .*'cafe\\u0301'"):
        open_rows(label=datasets.ClassLabel(names=["café", "tea", "cafe\u0301"]))


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "more.csv"])
def test_a_pipe_instead_of_a_table_is_refused(
    name: str, tmp_path: Path, rows: dict[str, dict[str, list[Any]]], open_rows: Opener
) -> None:
    root = write(tmp_path / "set", rows)
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    with pytest.raises(ValueError, match=rf"{root / name} is a pipe \(FIFO\), not a regular file"):
        open_rows(root)


def test_a_row_that_leads_to_a_pipe_or_a_device_cannot_be_read(image_folder: Path, open_rows: Opener) -> None:
    data = open_rows(image_folder)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (image_folder / "val/a/0.png").unlink()
        make(image_folder / "val/a/0.png")
        with pytest.raises(ValueError, match=r"^image in row 0 of validation of .*: .*0\.png is a .*, not a regular"):
            read(data)


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_changed_rows_have_another_hash(
    form: str, rows: dict[str, dict[str, list[Any]]], tmp_path: Path, image_folder: Path, make_config: MakeConfig
) -> None:
    root = image_folder if form == "folder" else write(tmp_path / "set", rows)
    before = open_listing(make_config(f"hfds/{root}")).inventories
    again = open_listing(make_config(f"hfds/{root}", root=tmp_path / "other cache")).inventories
    assert before == again
    if form == "folder":
        file = image_folder / "val/b/1.JPG"
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        shutil.rmtree(root)
        rows["validation"]["image"][5]["bytes"] += b"\0"
        write(root, rows)
    after = open_listing(make_config(f"hfds/{root}", root=tmp_path / "a third")).inventories
    assert after["train"] == before["train"]
    name = "1/val/b/1.JPG" if form == "folder" else "1/row 5"
    said = first_difference(before["val"].packed, after["val"])
    assert re.fullmatch(rf"{name} has \d+ bytes and had \d+", said)
