"""The transforms of detection: pixels, boxes and masks move together, by the numbers of the paper; and batches."""

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from mpvg.config import AugmentConfig, RunConfig
from mpvg.data import Sample, Shard, open_data
from mpvg.data.annotations import ImageAnnotations
from mpvg.data.order import BatchOrder
from mpvg.data.rle import encode_mask
from mpvg.data.scenes import (
    DetectionSizes,
    Scene,
    SceneBatch,
    SceneTarget,
    TestScene,
    TrainScene,
    collate_scenes,
    detection_pipeline,
    keep_ratio,
    padded_size,
    resize,
    to_scene,
    without_empty,
)
from mpvg.data.types import DataInfo, Pipeline, Split
from mpvg.seeding import seeded
from scene_files import annotation, content, write_coco, write_image

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
INFO = DataInfo(
    name="any",
    class_names=("a", "b", "c"),
    in_chans=3,
    img_size=64,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    train_size=1,
    val_size=1,
)
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
BOXES = ((10, 20, 70, 60), (100, 5, 160, 100), (30, 80, 90, 115))


def sample(width: int = 180, height: int = 120, boxes: Any = BOXES) -> Sample:
    """Rectangles of pure colors on black, annotated."""
    pixels = np.zeros((height, width, 3), np.uint8)
    masks = []
    for (left, top, right, bottom), color in zip(boxes, COLORS, strict=False):
        pixels[top:bottom, left:right] = color
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
        masks.append(encode_mask(mask))
    count = len(boxes)
    truth = ImageAnnotations(
        image_id=1,
        height=height,
        width=width,
        boxes=np.array(boxes, float).reshape(-1, 4),
        labels=np.arange(count),
        areas=np.ones(count),
        crowd=np.zeros(count, bool),
        outlines=tuple(masks),
    )
    return Sample(Image.fromarray(pixels), truth)


def colors(image: Tensor) -> Tensor:
    """The pixels, in [0, 1], of a normalized image."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (INFO.mean, INFO.std))
    return image * std + mean


def found_box(inside: Tensor) -> list[float]:
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    return [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]


SIZES = {
    "paper": DetectionSizes(),
    "small": DetectionSizes(
        short_sides=(60, 90, 150), long_side=260, first_sides=(50, 70), crop_sides=(40, 66), max_side=128
    ),
    "fixed": DetectionSizes.fixed(96),
}


@pytest.mark.parametrize(("name", "seeds"), [("small", 60), ("fixed", 4), ("paper", 4)])
def test_boxes_and_masks_move_with_the_pixels(name: str, seeds: int) -> None:
    transform, counts = TrainScene(SIZES[name], 0.5, INFO), []
    for seed in range(seeds):
        with seeded(seed):
            image, (boxes, labels, masks, truth) = transform(sample())
        assert truth is None
        assert masks.shape == (len(boxes), *image.shape[1:])
        assert image.dtype == boxes.dtype == torch.float32
        counts.append(len(boxes))
        for box, label, mask in zip(boxes, labels.tolist(), masks, strict=True):
            inside = colors(image)[label] > 0.5
            if min(box[2] - box[0], box[3] - box[1]) < 3:  # a sliver at the edge of a crop
                continue
            assert np.allclose(found_box(inside), box, atol=1.5), (seed, label)  # edges are mixed colors
            # Resized by the nearest pixel, and that twice where there is a crop between.
            assert np.allclose(found_box(mask.bool()), box, atol=4 if name == "small" else 2.01)
            left, top, right, bottom = found_box(mask.bool())
            assert mask.sum() == (right - left) * (bottom - top)  # still a rectangle
    assert name != "small" or len(set(counts)) > 1  # crops leave some objects out


def test_flip_is_half_of_the_time_and_of_everything() -> None:
    transform = TrainScene(replace(DetectionSizes.fixed(120), long_side=180, max_side=180), 0.5, INFO)
    lefts = []
    for seed in range(40):
        with seeded(seed):
            image, (boxes, _, masks, _) = transform(sample())
        assert image.shape == (3, 120, 180)
        expected = [BOXES[0][0], 180 - BOXES[0][2]]
        assert boxes[0, 0] in expected
        assert found_box(masks[0].bool()) == boxes[0].tolist() == found_box(colors(image)[0] > 0.5)
        lefts.append(expected.index(int(boxes[0, 0])))
    assert 8 < sum(lefts) < 32


def rescaled(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """mmcv's rule, written plainly."""
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def test_sizes_of_training_are_those_of_the_two_policies() -> None:
    """Recomputed from the same random numbers, in MMDetection's order."""
    sides = tuple(range(480, 801, 32))
    assert DetectionSizes().short_sides == sides
    crops = 0
    for seed in range(6):
        with seeded(seed):
            image, _ = TrainScene(DetectionSizes(), 0.5, INFO)(sample(boxes=BOXES[:1]))
        rng, height, width = random.Random(seed), 120, 180
        rng.random()
        if rng.random() < 0.5:
            full = rescaled(height, width, rng.choice((400, 500, 600)), 1333)
            height, width = (rng.randint(min(side, 384), min(side, 600)) for side in full)
            for side, part in zip(full, (height, width), strict=True):
                rng.randint(0, side - part)
            crops += 1
        height, width = rescaled(height, width, rng.choice(sides), 1333)
        assert image.shape[1:] == (min(height, 1024), min(width, 1024))
    assert 0 < crops < 6


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (120, 2000), (1, 1000), (33, 33)])
@pytest.mark.parametrize(("short", "long"), [(800, 1333), (480, 1333), (512, 2048)])
def test_ratio_is_kept_as_in_mmcv(size: tuple[int, int], short: int, long: int) -> None:
    height, width = keep_ratio(size, short, long)
    assert (height, width) == tuple(max(1, side) for side in rescaled(*size, short, long))
    assert max(height, width) <= long
    assert min(height, width) <= short


def test_resize_is_bilinear_at_pixel_centers() -> None:
    """Against a plain loop: no antialiasing, half-pixel centers, edges repeated."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (3, 9, 13)).astype(np.float32)
    for height, width in ((6, 20), (4, 5), (17, 26)):
        expected = np.zeros((3, height, width))
        for y in range(height):
            for x in range(width):
                down, across = (y + 0.5) * 9 / height - 0.5, (x + 0.5) * 13 / width - 0.5
                top, left = int(np.floor(down)), int(np.floor(across))
                for row, share in ((top, 1 - (down - top)), (top + 1, down - top)):
                    for column, part in ((left, 1 - (across - left)), (left + 1, across - left)):
                        near = pixels[:, min(max(row, 0), 8), min(max(column, 0), 12)]
                        expected[:, y, x] += share * part * near
        found = resize(tv_tensors.Image(torch.from_numpy(pixels)), (height, width))
        assert np.allclose(found.numpy(), expected, atol=1e-3)


def test_a_crop_cuts_boxes_and_may_leave_none() -> None:
    scene = to_scene(sample())
    part = Scene(*(functional.crop(part, 30, 40, 50, 70) for part in scene))
    cut, labels = without_empty(part, torch.arange(3))
    assert cut.boxes.tolist() == [[0, 0, 30, 30], [60, 0, 70, 50]]
    assert labels.tolist() == [0, 1]
    assert cut.masks.shape == (2, 50, 70)
    nothing, labels = without_empty(Scene(*(functional.crop(p, 60, 100, 30, 0) for p in scene)), torch.arange(3))
    assert nothing.boxes.shape == (0, 4)
    assert len(nothing.masks) == len(labels) == 0


def test_boxes_beyond_the_image_are_cut() -> None:
    one = sample()
    one.target.boxes[0] = [-3, 20, 70.4, 200]
    with seeded(0):
        _, target = TrainScene(replace(DetectionSizes.fixed(120), long_side=180, max_side=180), 0.0, INFO)(one)
    assert target.boxes[0].tolist() == [0, 20, pytest.approx(70.4), 120]


def test_an_empty_scene_goes_through() -> None:
    for seed in range(6):
        with seeded(seed):
            image, target = TrainScene(SIZES["small"], 0.5, INFO)(sample(boxes=()))
        assert target.boxes.shape == (0, 4)
        assert target.masks.shape == (0, *image.shape[1:])
        assert target.labels.dtype == torch.int64


def test_evaluation_keeps_what_is_annotated() -> None:
    one = sample()
    image, target = TestScene(DetectionSizes(), INFO)(one)
    assert image.shape == (3, 800, 1200)
    assert target.truth is one.target
    assert target.masks is None
    for box, label in zip(target.boxes, target.labels.tolist(), strict=True):
        assert np.allclose(found_box(colors(image)[label] > 0.5), box, atol=1.01)
    gray = TestScene(DetectionSizes(), INFO).image(Image.new("L", (1333, 10)))
    assert gray.shape == (3, 10, 1333)


def batch() -> SceneBatch:
    samples = []
    for number, (height, width) in enumerate(((50, 70), (64, 33), (31, 96))):
        boxes, labels = torch.full((number, 4), 5.0), torch.full((number,), number)
        masks = torch.ones(number, height, width, dtype=torch.uint8)
        samples.append(Sample(torch.full((3, height, width), 1.0 + number), SceneTarget(boxes, labels, masks, None)))
    return collate_scenes(samples)


def test_batches_are_padded_below_and_on_the_right() -> None:
    found = batch()
    assert found.images.shape == (3, 3, 64, 96)
    assert found.sizes == [(50, 70), (64, 33), (31, 96)]
    assert found.padded_sizes == [(64, 96), (64, 64), (32, 96)]
    for number, (height, width) in enumerate(found.sizes):
        assert (found.images[number, :, :height, :width] == 1 + number).all()
        assert found.images[number].sum() == 3 * height * width * (1 + number)
    assert padded_size((1, 32)) == (32, 32)


def test_parts_of_a_batch() -> None:
    found = batch().to(CPU)
    assert found.size == 3
    assert [part.size for part in found.split(2)] == [2, 1]
    assert all(part.images.shape[-2:] == (64, 96) for part in found.split(2))
    alone = found.one_by_one()
    assert [part.images.shape for part in alone] == [(1, 3, 64, 96), (1, 3, 64, 64), (1, 3, 32, 96)]
    assert [part.targets[0].labels.tolist() for part in alone] == [[], [1], [2, 2]]
    assert pickle.loads(pickle.dumps(found)).sizes == found.sizes


@pytest.mark.parametrize("field", [{"auto_augment": "rand-m9-mstd0.5-inc1"}, {"mixup": 0.8}, {"erase": 0.2}])
def test_augmentation_of_classification_is_refused(make_config: MakeConfig, field: dict[str, Any]) -> None:
    config = replace(make_config("any"), augment=AugmentConfig(hflip=0.5, **field))
    with pytest.raises(ValueError, match=rf"augment.{next(iter(field))} is .* for image classification; leave it out"):
        detection_pipeline(config, INFO, "train", DetectionSizes())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """11 wide and 7 high images, each with its number's object."""
    values = content(0)
    root = write_coco(tmp_path / "mixed")
    for number in range(18):
        width, height = (64, 48) if number % 5 < 3 else (40, 64)
        write_image(root / "train2017" / f"m{number:02d}.png", width, height, number)
        values["images"].append({"id": number, "file_name": f"m{number:02d}.png", "width": width, "height": height})
        values["annotations"].append(annotation(number + 1, number, 7, (number, 3, 12, 20)))
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(values))
    return root


def wide_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
    sizes = DetectionSizes(short_sides=(32, 48), long_side=64, first_sides=(), max_side=64, test_side=48)
    return detection_pipeline(config, info, split, sizes)


def read(batches: Any, epoch: int, start: int = 0) -> list[SceneBatch]:
    return list(batches.epoch(epoch, start))


def same(one: SceneBatch, two: SceneBatch) -> bool:
    pairs = zip(one.targets, two.targets, strict=True)
    return torch.equal(one.images, two.images) and all(torch.equal(a.boxes, b.boxes) for a, b in pairs)


def test_batches_are_of_one_orientation_and_resume_exactly(make_config: MakeConfig, mixed: Path) -> None:
    def opened(rank: int = 0, world_size: int = 1) -> Any:
        config = make_config(f"coco/{mixed}", batch_size=4, hflip=0.5)
        return open_data(config, Shard(CPU, rank, world_size), wide_pipeline).train

    for epoch in range(3):
        whole = read(opened(), epoch)
        assert len(whole) == len(opened()) == 4
        kinds = [{width > height for height, width in one.sizes} for one in whole]
        assert sum(len(kind) > 1 for kind in kinds) <= 1
        for start in range(5):
            assert all(map(same, whole[start:], read(opened(), epoch, start)))
        halves = [read(opened(rank, 2), epoch) for rank in range(2)]
        for one, *parts in zip(whole, *halves, strict=True):
            assert [size for part in parts for size in part.sizes] == one.sizes
            joined = torch.cat([target.boxes for part in parts for target in part.targets])
            assert torch.equal(joined, torch.cat([target.boxes for target in one.targets]))
    assert [one.sizes for one in read(opened(), 0)] != [one.sizes for one in read(opened(), 1)]


@pytest.mark.parametrize(("size", "high", "batch_size"), [(50, 11, 4), (50, 2, 4), (37, 18, 8), (8, 4, 8), (20, 0, 3)])
def test_every_epoch_has_as_many_batches_as_without_groups(size: int, high: int, batch_size: int) -> None:
    groups = torch.arange(size) >= high
    order = BatchOrder(size=size, batch_size=batch_size, shuffle=True, seed=0, rank=0, world_size=1, groups=groups)
    read_in_all: set[int] = set()
    for epoch in range(12):
        batches = [one.tolist() for one in order.batches(epoch, 0)]
        assert len(batches) == len(order) == size // batch_size
        everyone = [number for one in batches for number in one]
        assert len(set(everyone)) == len(everyone)
        assert sum(len({bool(groups[number]) for number in one}) > 1 for one in batches) <= 1
        read_in_all |= set(everyone)
    assert read_in_all == set(range(size))
