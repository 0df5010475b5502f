"""`canvas`: what makes its figures honest, through the readers that a run uses."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpvg.config import RunConfig
from mpvg.data import DATASETS, Shard, canvas, canvas_files, named_sets, open_data, open_listing
from mpvg.data.canvas_files import write_scenes
from mpvg.data.canvas_scenes import LEVELS, MIN_VISIBLE, TILE, Level, Scene, Sources, draw_scene
from mpvg.data.named_sets import canvas_sources
from mpvg.data.types import Split

MakeConfig = Callable[..., RunConfig]
SPLITS: tuple[Split, ...] = ("train", "val")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Few scenes, in a cache of the test's own."""
    for name, counts in (("canvas.SCENES", {"train": 12, "val": 5}), ("named_sets.TILES", {"train": 20, "val": 10})):
        monkeypatch.setattr(f"mpvg.data.{name}", counts)
    monkeypatch.setattr(named_sets, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def garments() -> Sources:
    """Blobs with a dark part inside and nothing around."""
    rng = np.random.default_rng(0)
    images = np.zeros((9, 28, 28), np.uint8)
    images[:, 5:24, 8:20] = rng.integers(90, 256, (9, 19, 12))
    return Sources(images, np.arange(9), solid=True)


def scenes(level: Level, sources: Sources, count: int = 25) -> list[Scene]:
    return [draw_scene(np.random.default_rng(number), sources, level) for number in range(count)]


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("objects", ["digits", "garments"])
def test_at_least_half_of_each_object_is_visible(name: str, objects: str) -> None:
    level = LEVELS[name]
    sources = canvas_sources("", None, ("train",))[1]["train"] if objects == "digits" else garments()
    covered = 0
    for scene in scenes(level, sources):
        assert scene.image.shape == ((level.side, level.side, 3) if level.colored else (level.side, level.side))
        assert level.objects[0] <= len(scene.labels) <= level.objects[1]
        visible = np.bincount(scene.objects.ravel(), minlength=len(scene.labels) + 1)[1:]
        assert (visible >= MIN_VISIBLE * np.array(scene.totals)).all()
        assert scene.labels == sources.labels[scene.sources].tolist()
        covered += int((visible < scene.totals).sum())
    assert covered > 0  # so the rule is met by more than distance


@pytest.mark.parametrize("name", ["easy", ""])
def test_objects_are_bright_and_clutter_is_as_the_level_says(name: str) -> None:
    sources = canvas_sources("", None, ("train",))[1]["train"]
    inside, brightest_outside = [], []
    for scene in scenes(LEVELS[name], sources):
        pixels = scene.image / 255
        inside.append(np.median(pixels[scene.objects > 0]))
        far = np.ones_like(scene.objects, bool)
        for rows, columns in zip(*np.nonzero(scene.objects), strict=True):
            far[max(0, rows - 5) : rows + 6, max(0, columns - 5) : columns + 6] = False  # soft edges
        if far.any():
            brightest_outside.append(np.quantile(pixels[far], 0.999))
            assert 0.1 < np.median(pixels[far]) < 0.4
    assert np.min(inside) > 0.65
    top = np.median(brightest_outside)
    assert top < 0.75 if name == "easy" else top > 0.8


def test_splits_have_no_source_image_in_common() -> None:
    sources = canvas_sources("", None, SPLITS)[1]
    train, val = ({image.tobytes() for image in sources[split].images} for split in SPLITS)
    assert len(train) > 1400
    assert not train & val


def test_both_layouts_are_the_same_scenes(make_config: MakeConfig, few: Path) -> None:
    detection, segmentation = (open_listing(make_config(f"{name}/canvas")) for name in ("coco", "ade20k"))
    assert detection.img_size == segmentation.img_size == 128
    assert segmentation.class_names == (*detection.class_names, "background")
    for split, count in (("train", 12), ("val", 5)):
        boxed, labelled = detection.source(split), segmentation.source(split)
        assert len(boxed) == len(labelled) == count
        for index in range(count):
            (image, truth), (same, label_map) = boxed.read(index), labelled.read(index)
            assert image.tobytes() == same.tobytes()
            masks, labels = truth.masks(), label_map.labels
            assert masks.sum(0).max() == 1  # each pixel is of one object at most: what is hidden is of none
            expected = np.full(labels.shape, 10)  # a class of its own, not 255
            for mask, label, box, area in zip(masks, truth.labels, truth.boxes, truth.areas, strict=True):
                expected[mask == 1] = label
                rows, columns = np.nonzero(mask)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert area == mask.sum()
            assert np.array_equal(labels, expected)


def test_the_same_bits_twice_and_other_scenes_in_each_split(tmp_path: Path) -> None:
    names, sources = canvas_sources("", None, SPLITS)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_scenes(tmp_path / folder, LEVELS["hard"], sources, names, {"train": 4, "val": 4})
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 2 * (4 + 4 + 1) + 1
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "one" / "images").rglob("*.png"))]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(images, 2))


def test_every_name_is_drawn_once_and_read_again(
    make_config: MakeConfig, few: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(canvas.CANVASES) == 6
    config = make_config("coco/canvas-hard")
    first = open_listing(config)
    assert first.img_size == 160
    assert [path.name for path in (few / "canvas").iterdir()] == ["canvas-hard-v1"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(canvas, "write_scenes", never)
    assert open_listing(config).inventories["train"].hash == first.inventories["train"].hash
    open_listing(make_config("ade20k/canvas-hard"))
    with pytest.raises(AssertionError):
        open_listing(make_config("coco/canvas-hard", root=tmp_path / "other"))
    assert list((tmp_path / "other" / "canvas").iterdir()) == []  # nothing half made is left


def test_garments_are_read_from_their_folder(
    make_config: MakeConfig, few: Path, fashion_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_sets, "DEBIAN", few)
    listing = open_listing(make_config("ade20k/canvas-garments-easy", root=fashion_folder))
    assert listing.class_names[0] == "T-shirt/top"
    assert (fashion_folder / "canvas" / "canvas-garments-easy-v1").is_dir()
    with pytest.raises(FileNotFoundError, match="data 'fashion-mnist'"):
        open_listing(make_config("coco/canvas-garments"))


def test_two_processes_may_draw_at_once(few: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("slow")
        if not (few / "canvas" / "name-v1").exists():
            canvas_files.made_once(few, "name", lambda: lambda inner: (inner / "file").touch())

    assert (canvas_files.made_once(few, "name", lambda: fill) / "file").read_text() == ""
    assert [path.name for path in (few / "canvas").iterdir()] == ["name-v1"]


def test_a_cache_that_cannot_be_written_is_named(make_config: MakeConfig, few: Path) -> None:
    few.write_text("a file")
    with pytest.raises(OSError, match=re.escape(f"cannot write {few}/canvas/canvas-v1")):
        open_listing(make_config("coco/canvas"))


def test_tiles_are_single_objects_of_the_training_sources(make_config: MakeConfig, few: Path) -> None:
    assert {"canvas-tiles", "canvas-tiles-garments"} < set(DATASETS)
    data = open_data(make_config("canvas-tiles"), Shard(torch.device("cpu")))
    assert (data.info.train_size, data.info.val_size, data.info.img_size, data.info.in_chans) == (20, 10, 64, 3)
    assert data.info.mean == open_listing(make_config("coco/canvas")).mean
    images, _ = next(iter(data.val.epoch()))
    assert images.shape == (8, 3, 64, 64)
    sources = canvas_sources("", None, SPLITS)[1]
    for split in SPLITS:
        _, labels = canvas_files.read_tiles(few / "canvas" / "canvas-tiles-v1", split)
        drawn = [draw_scene(canvas_files._generator(split, number), sources[split], TILE) for number in range(10)]
        assert labels[:10].tolist() == [int(sources[split].labels[tile.sources[0]]) for tile in drawn]
        assert all(len(tile.labels) == 1 for tile in drawn)


@pytest.mark.parametrize("damage", ["gone", "cut", "objects", "shape"])
def test_damaged_tiles_are_refused(make_config: MakeConfig, few: Path, damage: str) -> None:
    open_listing(make_config("canvas-tiles"))
    file = few / "canvas" / "canvas-tiles-v1" / "train.npy"
    damages: dict[str, Callable[[], Any]] = {
        "gone": file.unlink,
        "cut": lambda: file.write_bytes(file.read_bytes()[:-1]),
        "objects": lambda: np.save(file, np.array([print], object), allow_pickle=True),
        "shape": lambda: np.save(file, np.zeros((3, 64, 64), np.uint8)),
    }
    damages[damage]()
    with pytest.raises(ValueError, match=r"the tiles of train in .* are damaged .*remove the folder"):
        open_listing(make_config("canvas-tiles"))
