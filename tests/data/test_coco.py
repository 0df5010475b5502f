"""COCO's layout: what is read, what is left out, what is refused."""

import dataclasses
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as oracle
from pycocotools.coco import COCO

from hostile import HARMFUL
from mpvg.config import RunConfig
from mpvg.data import Listing, Shard, open_data, open_listing
from mpvg.data.annotations import Annotations
from mpvg.data.inventory import first_difference
from mpvg.data.rle import encode_mask
from mpvg.data.rules import say_once
from mpvg.data.scenes import DetectionSizes, SceneBatch, detection_pipeline
from mpvg.data.types import DataInfo, Pipeline, Split
from mpvg.runs.reading import read_info
from odd_images import ODD
from scene_files import HEIGHT, WIDTH, Json, annotation, changed, content, polygon, write_coco, write_image

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def every_line() -> None:
    """What is said once in a process is said once in each test."""
    say_once.cache_clear()


def listed(config: RunConfig, *splits: Split) -> Listing:
    return open_listing(config, splits or ("train", "val"))


def targets(listing: Listing, split: Split = "train") -> Annotations:
    found: Any = listing.source(split)
    assert isinstance(found.targets, Annotations)
    return found.targets


def small_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
    return detection_pipeline(config, info, split, DetectionSizes.fixed(32))


def test_objects_are_as_annotated_with_classes_in_the_order_of_the_ids(make_config: MakeConfig, tmp_path: Path) -> None:
    listing = listed(make_config(f"coco/{write_coco(tmp_path / 'data')}"))
    assert listing.class_names == ("bicycle", "train", "toothbrush")
    assert listing.category_ids == (2, 7, 90)
    found = targets(listing)
    assert [one.image_id for one in found] == [10, 20, 30]
    one = found[2]
    assert one.boxes.tolist() == [[2.5 + 3 * n, 7, 22.75 + 3 * n, 19] for n in range(3)]
    assert one.labels.tolist() == [1, 0, 2]
    assert one.areas.tolist() == [243.0] * 3
    assert (one.width, one.height) == (WIDTH, HEIGHT)
    sample = listing.source("val").read(1)
    assert sample.image.size == (WIDTH, HEIGHT)
    assert sample.target.image_id == 20


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_masks_and_run_lengths_are_pycocotools_own(make_config: MakeConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = content(1)
    values["annotations"] = []
    for number in range(30):
        corners = [rng.random((int(rng.integers(3, 9)), 2)) * [WIDTH, HEIGHT] for _ in range(2)]
        parts = [points.round(2).ravel().tolist() for points in corners]
        kinds: list[Any] = [parts[:1], parts]
        mask = rng.random((HEIGHT, WIDTH)) < 0.5
        kinds.append({"size": [HEIGHT, WIDTH], "counts": encode_mask(mask).decode()})
        flat = mask.ravel(order="F")
        changes = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
        kinds.append({"size": [HEIGHT, WIDTH], "counts": [0] * int(flat[0]) + np.diff(changes).tolist()})
        other = {"segmentation": kinds[number % 4], "iscrowd": int(number % 4 == 3)}
        values["annotations"].append(annotation(number + 1, 10, 7, (1, 1, 20, 20), **other))
    root = write_coco(tmp_path / "data", val=values)
    found = targets(listed(make_config(f"coco/{root}"), "val"), "val")[0]
    expected = COCO(str(root / "annotations" / "instances_val2017.json"))
    annotations = expected.loadAnns(expected.getAnnIds())
    assert np.array_equal(found.masks(), np.stack([expected.annToMask(one) for one in annotations]))
    for text, one in zip(found.run_lengths(), annotations, strict=True):
        counts = expected.annToRLE(one)["counts"]
        assert text == (counts.encode() if isinstance(counts, str) else counts)
    assert oracle.area([{"size": [HEIGHT, WIDTH], "counts": text} for text in found.run_lengths()]).min() > 0


def test_workers_share_arrays(make_config: MakeConfig, tmp_path: Path) -> None:
    found = targets(listed(make_config(f"coco/{write_coco(tmp_path / 'data')}")))
    values = [*vars(found).values(), *vars(found.columns).values()]
    assert all(isinstance(value, np.ndarray) for value in values if value is not found.columns)
    assert all(value.dtype != object for value in values if value is not found.columns)
    copy = pickle.loads(pickle.dumps(found))  # as a spawned worker gets it
    assert copy.hashes() == found.hashes()


def test_training_leaves_out_what_mmdetection_does_and_says_so(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = content(3)
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 100, HEIGHT * WIDTH - 100]}
    values["annotations"][0] |= {"iscrowd": 1, "segmentation": crowd}  # the only one of image 10
    values["annotations"] += [
        annotation(1, 20, 7, (3, 3, 0.5, 9)),
        annotation(2, 20, 7, (3, 3, 9, 9), area=0),
        annotation(3, 20, 7, (3, 3, 0, 9)),
        annotation(4, 20, 7, (60, 3, 9, 9), segmentation=[polygon(40, 3, 5, 5)]),
        annotation(5, 20, 7, (3, 3, 1, 1)),
    ]
    values["images"].append({"id": 40, "file_name": "flat.png", "width": 200, "height": 31})
    values["annotations"].append(annotation(6, 40, 7, (3, 3, 9, 9)))
    root = write_coco(tmp_path / "data", values, values)
    for split in ("train", "val"):
        write_image(root / f"{split}2017" / "flat.png", 200, 31)
    listing = listed(make_config(f"coco/{root}"))
    assert [one.image_id for one in targets(listing)] == [20, 30]
    assert [len(one.labels) for one in targets(listing)] == [3, 3]
    kept = targets(listing, "val")
    assert [one.image_id for one in kept] == [10, 20, 30, 40]
    assert [len(one.labels) for one in kept] == [1, 5, 3, 1]
    assert kept[0].crowd.tolist() == [True]
    said = [record.getMessage().partition("left out: ")[2] for record in caplog.records]
    both = "1 annotation has an empty box; 1 annotation has a box outside its image"
    train = (
        "1 crowd annotation is not trained on; 2 annotations have a side below 1 pixel or an area of 0; "
        "1 image has a side below 32 pixels; 1 image has no objects to train on"
    )
    assert sorted(said) == sorted([f"{both}; {train}", both])


def test_an_empty_scene_is_evaluated_and_not_trained_on(make_config: MakeConfig, tmp_path: Path) -> None:
    values = content(3)
    values["annotations"] = [one for one in values["annotations"] if one["image_id"] != 20]
    root = write_coco(tmp_path / "data", values, values)
    data = open_data(make_config(f"coco/{root}", batch_size=2), Shard(torch.device("cpu")), small_pipeline)
    assert data.info.train_size == 2
    assert data.info.val_size == 3
    batches: list[SceneBatch] = [*data.val.epoch()]
    assert [target.boxes.shape for batch in batches for target in batch.targets] == [(1, 4), (0, 4), (3, 4)]
    empty = batches[0].targets[1].truth
    assert empty is not None
    assert empty.masks().shape == (0, HEIGHT, WIDTH)


RLE = {"size": [HEIGHT, WIDTH], "counts": "0"}
REFUSED: dict[str, tuple[Callable[[Json], Json], str]] = {
    "missing file": (
        lambda v: changed(v, "images", 1, file_name="gone.png"),
        r"1 image has no file \(the first: gone.png\)",
    ),
    "folder below": (lambda v: changed(v, "images", 1, file_name="1.png/x"), r"1 image has no file"),
    "unknown image": (
        lambda v: changed(v, "annotations", 1, image_id=11),
        r"1 annotation belongs to an image that is not in the file \(the first: 200\)",
    ),
    "unknown category": (lambda v: changed(v, "annotations", 0, category_id=3), "1 annotation has a category that is"),
    "the same id": (
        lambda v: changed(changed(v, "annotations", 1, id=100), "annotations", 2, id=100),
        r"2 annotations have the id of another \(the first: 100\)",
    ),
    "two points": (
        lambda v: changed(v, "annotations", 0, segmentation=[polygon(1, 1, 5, 5), [1, 2, 3, 4]]),
        "1 annotation has a polygon of fewer than three points",
    ),
    "odd number": (
        lambda v: changed(v, "annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "or of an odd number of coordinates",
    ),
    "far polygon": (
        lambda v: changed(v, "annotations", 0, segmentation=[[1, 2, 1e9, 4, 5, 6]]),
        "1 annotation has a polygon far outside its image",
    ),
    "infinite polygon": (
        lambda v: changed(v, "annotations", 0, segmentation=[[1, 2, 10**400, 4, 5, 6]]),
        "segmentation is neither polygons nor run lengths",
    ),
    "no mask": (lambda v: changed(v, "annotations", 0, segmentation=[]), "1 annotation has no mask"),
    "infinite box": (lambda v: changed(v, "annotations", 0, bbox=[1, 2, 1e308 * 10, 3]), "Infinity is no number"),
    "run lengths of another size": (
        lambda v: changed(v, "annotations", 0, segmentation={"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}),
        "1 annotation has run lengths for another size than its image's",
    ),
    "run lengths that do not add up": (
        lambda v: changed(v, "annotations", 0, segmentation=RLE),
        "1 annotation has damaged run lengths",
    ),
    "run lengths of something else": (
        lambda v: changed(v, "annotations", 0, segmentation=RLE | {"counts": "hello world"}),
        "1 annotation has damaged run lengths",
    ),
    "too many": (
        lambda v: v | {"annotations": v["annotations"] + [annotation(-n, 10, 7, (1, 1, 9, 9)) for n in range(1001)]},
        r"1 image has more than 1,000 annotations \(the first: 1.png\)",
    ),
}
LEFT_OUT = REFUSED.keys() - {"infinite polygon", "infinite box"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_counted_and_refused(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    break_it, message = REFUSED[name]
    root = write_coco(tmp_path / "data", break_it(content()))
    with pytest.raises(ValueError, match=message) as found:
        listed(make_config(f"coco/{root}"))
    assert str(root / "annotations" / "instances_train2017.json") in str(found.value)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_it_is_left_out_if_asked_and_training_goes_on(
    make_config: MakeConfig, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    break_it, message = REFUSED[name]
    values = content()
    values["images"].append({"id": 50, "file_name": "3.png", "width": WIDTH, "height": HEIGHT})
    values["annotations"].append(annotation(999, 50, 7, (3, 3, 20, 20)))
    root = write_coco(tmp_path / "data", break_it(values))
    config = make_config(f"coco/{root}", skip_corrupt=True, batch_size=1)
    data = open_data(config, Shard(torch.device("cpu")), small_pipeline)
    assert re.search(message, caplog.text)
    batches = [*data.train.epoch()]
    assert len(batches) == data.info.train_size >= 1
    assert data.train.skipped == 0


FATAL: dict[str, tuple[Callable[[Json], Any], str]] = {
    "no object": (lambda v: [v], r"is no annotation file of COCO: it does not begin with \{"),
    "captions": (
        lambda v: v | {"annotations": [{"id": 1, "image_id": 10, "caption": "a cat"}]},
        "annotation number 1: its bbox or area is no box or number",
    ),
    "no lists": (lambda v: {"data": [1]}, "it has no annotations and no categories and no images"),
    "no annotations": (lambda v: v | {"annotations": []}, "has no annotation;"),
    "no images": (lambda v: v | {"images": []}, "has no image;"),
    "no categories": (lambda v: v | {"categories": []}, "has no category;"),
    "duplicate images": (
        lambda v: changed(v, "images", 1, id=10),
        r"1 images have the id of another \(the first: 10\)",
    ),
    "id of text": (lambda v: changed(v, "images", 1, id="x"), "image number 2: id is 'x'; allowed: a whole number"),
    "true as an id": (lambda v: changed(v, "annotations", 1, id=True), "annotation number 2: id is True"),
    "large id": (lambda v: changed(v, "annotations", 1, image_id=2**63), "annotation number 2: image_id is"),
    "box of three": (lambda v: changed(v, "annotations", 0, bbox=[1, 2, 3]), "annotation number 1: its bbox"),
    "box of text": (lambda v: changed(v, "annotations", 0, bbox=["1", 2, 3, 4]), "annotation number 1: its bbox"),
    "area of a list": (lambda v: changed(v, "annotations", 0, area=[]), "annotation number 1: its bbox or area"),
    "crowd of two": (
        lambda v: changed(v, "annotations", 0, iscrowd=2),
        "annotation number 1: iscrowd is 2; allowed: 0, 1",
    ),
    "flat polygon": (
        lambda v: changed(v, "annotations", 0, segmentation=[1, 2, 3, 4, 5, 6]),
        "is neither polygons nor",
    ),
    "text polygon": (lambda v: changed(v, "annotations", 0, segmentation=["abcdef"]), "is neither polygons nor"),
    "size of one": (
        lambda v: changed(v, "annotations", 0, segmentation={"size": [1], "counts": []}),
        "is neither polygons nor run lengths",
    ),
    "negative lengths": (
        lambda v: changed(v, "annotations", 0, segmentation={"size": [4, 4], "counts": [-1]}),
        "is neither polygons nor run lengths",
    ),
    "no size": (lambda v: changed(v, "images", 0, width=0), "image number 1 has 0x40 pixels; allowed"),
    "enormous": (lambda v: changed(v, "images", 0, width=60_000, height=60_000), "has 60000x60000 pixels; allowed"),
    "empty name": (lambda v: changed(v, "images", 0, file_name=""), "image number 1: file_name is ''"),
    "NUL": (lambda v: changed(v, "images", 0, file_name="a\0b"), "image number 1: file_name is"),
    "no Unicode": (lambda v: changed(v, "images", 0, file_name="a\ud800"), "which is no Unicode text"),
    "two names": (lambda v: changed(v, "categories", 0, name="train"), "has the id or the name of another"),
    "look alike": (
        lambda v: changed(changed(v, "categories", 0, name="café"), "categories", 1, name="cafe\u0301"),
        "look the same but are spelled differently",
    ),
}


@pytest.mark.parametrize("name", FATAL)
@pytest.mark.parametrize("skip", [False, True])
def test_a_file_that_is_none_is_refused_in_any_case(
    make_config: MakeConfig, tmp_path: Path, name: str, skip: bool
) -> None:
    break_it, message = FATAL[name]
    root = write_coco(tmp_path / "data", break_it(content()))
    with pytest.raises(ValueError, match=message):
        listed(make_config(f"coco/{root}", skip_corrupt=skip))


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\secret.png", "link.png", "folder/secret.png"]
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_name_that_leads_out_is_refused(make_config: MakeConfig, tmp_path: Path, name: str, skip: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_image(tmp_path / "elsewhere" / "secret.png")
    root = write_coco(tmp_path / "data", changed(content(), "images", 1, file_name=name))
    (root / "train2017" / "link.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (root / "train2017" / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"1 file names lead out of .*train2017 \(the first: .*without \.\."):
        listed(make_config(f"coco/{root}", skip_corrupt=skip))


def test_links_within_the_data_and_a_linked_folder_of_images_are_read(make_config: MakeConfig, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    (root / "train2017" / "2.png").unlink()
    (root / "train2017" / "2.png").symlink_to(root / "val2017" / "2.png")
    (root / "val2017").rename(tmp_path / "disk")
    (root / "val2017").symlink_to(tmp_path / "disk")  # so is COCO often put into place
    with pytest.raises(ValueError, match="1 file names lead out"):
        listed(make_config(f"coco/{root}"))
    assert len(listed(make_config(f"coco/{root}"), "val").source("val")) == 2
    (root / "train2017" / "2.png").unlink()
    (root / "train2017" / "2.png").symlink_to("3.png")
    assert len(listed(make_config(f"coco/{root}")).source("train")) == 3


def test_a_pipe_in_the_place_of_an_image_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    (root / "train2017" / "2.png").unlink()
    os.mkfifo(root / "train2017" / "2.png")
    with pytest.raises(ValueError, match="is a pipe"):
        listed(make_config(f"coco/{root}"))


def test_a_file_that_is_too_large_is_refused_unread(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_coco(tmp_path / "data")
    path = root / "annotations" / "instances_train2017.json"
    with path.open("r+b") as file:
        file.truncate(2**31)  # of zeros, which take no place on the disk
    with pytest.raises(ValueError, match=r"is no annotation file of COCO: .*longer|text follows its end"):
        listed(make_config(f"coco/{root}"))
    monkeypatch.setattr("mpvg.data.coco_file.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"has 2,147,483,648 bytes; allowed: at most 1,000"):
        listed(make_config(f"coco/{root}"))


def test_files_and_folders_are_found_by_their_names(make_config: MakeConfig, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    config = make_config(f"coco/{root}")
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "train2017")
    assert len(listed(config).source("train")) == 3
    (root / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"one file instances_val\*.json and has instances_val2014.json, instances_val20"
    ):
        listed(config)
    for path in (root / "annotations").glob("instances_val*"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must have one file instances_val\*.json and has none; give the folder"
    ):
        listed(config)
    (root / "images" / "train2017").rename(root / "images" / "other")
    with pytest.raises(ValueError, match="3 images have no file"):  # they are looked for in images/
        listed(config, "train")
    (root / "images" / "other").rename(root / "other")
    (root / "images").rmdir()
    with pytest.raises(FileNotFoundError, match="no folder train2017 and no images/train2017"):
        listed(config, "train")
    with pytest.raises(ValueError, match="names no folder; give coco/<folder in its layout> or coco/canvas"):
        listed(make_config("coco"))
    with pytest.raises(FileNotFoundError, match="data folder 'nowhere' does not exist"):
        listed(make_config("coco/nowhere"))


def test_classes_are_the_training_sets(make_config: MakeConfig, tmp_path: Path) -> None:
    val = content(2)
    val["categories"] = val["categories"][1:]
    for one in val["annotations"]:
        one["category_id"] = 7
    config = make_config(f"coco/{write_coco(tmp_path / 'fewer', val=val)}")
    assert targets(listed(config), "val")[0].labels.tolist() == [1]
    known = open_listing(config, ("val",), ("bicycle", "train", "toothbrush"))
    assert targets(known, "val")[0].labels.tolist() == [1]
    more = changed(content(2), "categories", 0, name="kite")
    with pytest.raises(ValueError, match="category 'kite' is in val but not in train"):
        listed(make_config(f"coco/{write_coco(tmp_path / 'more', val=more)}"))
    other = changed(content(2), "categories", 0, id=91)
    for one in other["annotations"]:
        one["category_id"] = 7
    with pytest.raises(ValueError, match="category 'toothbrush' has the id 91 in val and 90 in train"):
        listed(make_config(f"coco/{write_coco(tmp_path / 'other', val=other)}"))


def test_the_hash_covers_annotations_and_names_the_image(make_config: MakeConfig, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    config = make_config(f"coco/{root}")
    before = listed(config).inventories["train"]
    assert listed(config).inventories["train"].hash == before.hash
    path = root / "annotations" / "instances_train2017.json"
    changes: Sequence[Json] = (
        {"bbox": [2.5, 5, 20.5, 12]},
        {"category_id": 2},
        {"area": 1.0},
        {"segmentation": [polygon(2.5, 5, 20, 12)]},
    )
    for change in changes:
        path.write_text(json.dumps(changed(content(), "annotations", 1, **change)))
        now = listed(config).inventories["train"]
        assert now.hash != before.hash
        assert first_difference(before.packed, now) == "2.png has other annotations"
    path.write_text(json.dumps(content()))
    (root / "train2017" / "1.png").write_bytes(b"other")
    assert "1.png has 5 bytes and had" in first_difference(before.packed, listed(config).inventories["train"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_another_size_is_refused_or_skipped(make_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    root = write_coco(tmp_path / "data")
    write_image(root / "val2017" / "1.png", HEIGHT, WIDTH)
    options = {"batch_size": 1, "workers": workers}
    data = open_data(make_config(f"coco/{root}", **options), Shard(torch.device("cpu")), small_pipeline)
    with pytest.raises(
        ValueError, match=r"1.png cannot be read .*40x48 pixels, and its annotation is for 48x40; with ano"
    ):
        list(data.val.epoch())
    skipping = make_config(f"coco/{root}", skip_corrupt=True, **options)
    data = open_data(skipping, Shard(torch.device("cpu")), small_pipeline)
    assert len(list(data.val.epoch())) == 1
    assert data.val.skipped == 1


def test_a_very_long_image_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    values = content(2)
    values["images"].append({"id": 30, "file_name": "3.png", "width": 5000, "height": 1})
    values["annotations"].append(annotation(1, 30, 7, (2, 0, 9, 1), segmentation=[[2, 0, 9, 0, 9, 1]]))
    root = write_coco(tmp_path / "data", values, values)
    for split in ("train", "val"):
        write_image(root / f"{split}2017" / "3.png", 5000, 1)
    data = open_data(make_config(f"coco/{root}", batch_size=1), Shard(torch.device("cpu")), small_pipeline)
    assert data.info.train_size == 2  # a side below 32 pixels
    with pytest.raises(ValueError, match="3.png cannot be read .*5000x1 is too elongated to resize"):
        list(data.val.epoch())


@pytest.mark.parametrize("generate", [*HARMFUL, *ODD], ids=lambda generate: generate.__name__)
def test_hostile_images_are_read_or_named(make_config: MakeConfig, tmp_path: Path, generate: Any) -> None:
    case = generate(0, np.random.default_rng(0))
    height, width = case.picture.shape[:2] if case.picture is not None else (HEIGHT, WIDTH)
    values = content(1)
    values["images"][0] |= {"width": width, "height": height}
    values["annotations"] = [annotation(1, 10, 7, (0, 0, 2, 2))]
    root = write_coco(tmp_path / "data", val=values)
    path = root / "val2017" / "1.png"
    path.write_bytes(case.data)
    if case.size is not None:
        os.truncate(path, case.size)
    data = open_data(make_config(f"coco/{root}", batch_size=1), Shard(torch.device("cpu")), small_pipeline)
    error, batches = "", []
    try:
        batches = list(data.val.epoch())
    except ValueError as found:
        error = str(found)
    assert bool(error) != bool(batches)
    assert not error or ("1.png cannot be read" in error and (case.picture is None or case.may_fail)), error
    assert error or case.picture is not None
    assert all(batch.images.isfinite().all() for batch in batches)


def test_polygons_without_the_package_are_refused_at_the_start(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(ModuleNotFoundError, match=r"polygons need faster-coco-eval .*pip install 'mpvg\[det\]'"):
        listed(make_config(f"coco/{write_coco(tmp_path / 'data')}"))


def test_the_description_of_the_data_is_read_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(f"coco/{write_coco(tmp_path / 'data')}", batch_size=2)
    info = open_data(config, Shard(torch.device("cpu")), small_pipeline).info
    file = tmp_path / "data.json"
    file.write_text(json.dumps(dataclasses.asdict(info)))
    assert read_info(file) == info
    file.write_text(json.dumps(dataclasses.asdict(info) | {"category_ids": [1]}))
    with pytest.raises(ValueError, match="category_ids are 1; allowed: one for each class, or none"):
        read_info(file)


@pytest.mark.parametrize(
    ("crowds", "message"),
    [(False, "has no annotation; give"), (True, "no object is annotated in the validation images")],
)
def test_a_validation_set_without_objects_is_refused_before_training(
    make_config: MakeConfig, tmp_path: Path, crowds: bool, message: str
) -> None:
    values = content(2)
    all_pixels = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    for one in values["annotations"]:
        one |= {"iscrowd": 1, "segmentation": all_pixels}
    values["annotations"] = values["annotations"] if crowds else []
    root = write_coco(tmp_path / "data", val=values)
    with pytest.raises(ValueError, match=message):
        open_listing(make_config(f"coco/{root}"))
    assert open_listing(make_config(f"coco/{root}"), ("train",)).train is not None
