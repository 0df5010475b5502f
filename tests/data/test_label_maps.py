"""The transforms of segmentation, against plain references."""

import colorsys
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpvg.config import RunConfig
from mpvg.data import Sample
from mpvg.data.ade20k import IGNORED, LabelMap
from mpvg.data.label_maps import (
    LabelBatch,
    SegmentationSizes,
    TestLabelMap,
    TrainLabelMap,
    collate_label_maps,
    segmentation_pipeline,
    slide,
    windows,
)
from mpvg.data.photometric import change_color, distort
from mpvg.data.types import DataInfo
from mpvg.seeding import seeded

MakeConfig = Callable[..., RunConfig]
INFO = DataInfo(
    name="any",
    class_names=tuple("abcdef"),
    in_chans=3,
    img_size=64,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    train_size=1,
    val_size=1,
)
PAPER = SegmentationSizes()
PLAIN = SegmentationSizes(short_side=96, long_side=400, crop=96, distorted=False)


def sample(width: int = 150, height: int = 100) -> Sample:
    """Blocks whose red says their class: 40 times the label."""
    rows, columns = np.indices((height, width))
    labels = ((rows // 25 + columns // 30) % 5).astype(np.uint8)
    pixels = np.stack([40 * labels, 255 - 40 * labels, np.full_like(labels, 90)], -1)
    return Sample(Image.fromarray(pixels), LabelMap(labels))


def red(image: Tensor) -> Tensor:
    return 255 * (image[0] * INFO.std[0] + INFO.mean[0])


@pytest.mark.parametrize("seed", range(20))
def test_labels_move_with_the_pixels(seed: int) -> None:
    with seeded(seed):
        image, labels = TrainLabelMap(PLAIN, 0.5, INFO)(sample())
    assert image.shape == (3, 96, 96)
    assert labels.shape == (96, 96)
    assert labels.dtype == torch.uint8
    known = labels != IGNORED
    expected = torch.where(known, 40.0 * labels, 0.0)
    near = (red(image) - expected).abs() < 20  # but for the edges between blocks, which are mixed
    assert near[known].float().mean() > 0.8
    assert (image[:, ~known] == 0).all()  # padding is zero after the normalization
    rows, columns = known.any(1), known.any(0)
    assert rows[: int(rows.sum())].all()
    assert columns[: int(columns.sum())].all()


def test_sizes_are_those_of_the_ratio() -> None:
    sizes = SegmentationSizes(short_side=40, long_side=200, crop=256, ratio=(0.5, 2.0), distorted=False)
    seen = []
    for seed in range(20):
        with seeded(seed):
            _, labels = TrainLabelMap(sizes, 0.0, INFO)(sample())
        ratio = 0.5 + 1.5 * random.Random(seed).random()
        height = min(int(200 * ratio) / 150, int(40 * ratio) / 100) * 100
        assert int((labels != IGNORED).any(1).sum()) == int(height + 0.5)
        seen.append(height)
    assert min(seen) < 30
    assert max(seen) > 65


def test_a_crop_is_of_several_classes_where_there_are() -> None:
    labels = np.zeros((300, 300), np.uint8)
    labels[:150, :150] = 1
    one = Sample(Image.fromarray(np.zeros((300, 300, 3), np.uint8)), LabelMap(labels))
    sizes = SegmentationSizes(short_side=300, long_side=300, ratio=(1, 1), crop=96, distorted=False)
    shares = []
    for seed in range(30):
        with seeded(seed):
            _, found = TrainLabelMap(sizes, 0.0, INFO)(one)
        counts = torch.bincount(found.flatten())
        shares.append(float(counts.max() / counts.sum()))
    assert sum(share < 0.75 for share in shares) > 20  # without the rule, 1 in 7
    whole = Sample(one.image, LabelMap(np.zeros((300, 300), np.uint8)))
    assert (TrainLabelMap(sizes, 0.0, INFO)(whole)[1] == 0).all()  # there is no other: any crop is taken
    void = Sample(one.image, LabelMap(np.full((300, 300), IGNORED, np.uint8)))
    assert (TrainLabelMap(sizes, 0.0, INFO)(void)[1] == IGNORED).all()


def test_evaluation_is_of_multiples_of_32() -> None:
    one = sample(150, 100)
    image, labels = TestLabelMap(PAPER, INFO)(one)
    assert image.shape == (3, 512, 768)
    assert torch.equal(labels, torch.from_numpy(one.target.labels))
    assert TestLabelMap(PAPER, INFO).image(Image.new("P", (500, 333))).shape == (3, 512, 800)  # 512 x 769
    assert TestLabelMap(PAPER, INFO).image(Image.new("L", (500, 333)), ratio=0.5).shape == (3, 256, 384)
    assert TestLabelMap(SegmentationSizes.fixed(128), INFO).image(Image.new("RGB", (128, 128))).shape == (3, 128, 128)


def test_fixed_sizes_change_nothing() -> None:
    with seeded(0):
        image, labels = TrainLabelMap(SegmentationSizes.fixed(96), 0.0, INFO)(sample(96, 96))
    assert torch.equal(labels, torch.from_numpy(sample(96, 96).target.labels))
    assert torch.allclose(red(image), torch.from_numpy(np.array(sample(96, 96).image)[..., 0]).float(), atol=1e-3)


def turned(pixel: tuple[float, ...], saturation: float, hue: float) -> list[float]:
    """The color by Python's own conversions."""
    h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
    return [255 * value for value in colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)]


@pytest.mark.parametrize(
    ("saturation", "hue"), [(1.0, 0.0), (0.5, 0.0), (1.5, 0.0), (1.0, 0.1), (0.7, -0.1), (1.4, 0.05)]
)
def test_colors_change_as_in_hsv(saturation: float, hue: float) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3)).astype(np.float32)
    pixels[:6] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0], [200, 200, 10], [5, 200, 200]]
    expected = [turned(tuple(pixel), saturation, hue) for pixel in pixels.tolist()]
    found = change_color(torch.from_numpy(pixels.T[:, None].copy()), saturation, hue)
    assert np.allclose(found[:, 0].T.numpy(), expected, atol=1e-3)


def test_distortion_has_mmsegmentations_parts() -> None:
    pixels = torch.rand(3, 20, 20) * 255
    unchanged, changes = 0, []
    for seed in range(300):
        with seeded(seed):
            found = distort(pixels)
        assert found.min() >= 0
        assert found.max() <= 255
        unchanged += int(torch.equal(found, pixels))
        changes.append(float(found.mean() / pixels.mean()))
    assert 8 <= unchanged <= 32  # a sixteenth
    assert 0.3 < min(changes) < 0.6
    assert 1.2 < max(changes) < 1.8


def plain_windows(height: int, width: int, side: int, stride: int) -> list[tuple[int, int, int, int]]:
    """mmsegmentation's loop."""
    found = []
    for row in range(max(height - side + stride - 1, 0) // stride + 1):
        for column in range(max(width - side + stride - 1, 0) // stride + 1):
            top, left = row * stride, column * stride
            bottom, right = min(top + side, height), min(left + side, width)
            found.append((max(right - side, 0), max(bottom - side, 0), right, bottom))
    return found


@pytest.mark.parametrize(
    "size", [(512, 512), (512, 683), (512, 853), (513, 1024), (300, 200), (512, 2048), (853, 854), (1, 5000)]
)
def test_windows_are_mmsegmentations(size: tuple[int, int]) -> None:
    assert windows(size, 512, 341) == plain_windows(*size, 512, 341)


def test_sliding_takes_the_mean_of_what_covers_a_pixel() -> None:
    images = torch.rand(2, 3, 70, 100)
    calls = []

    def predict(part: Tensor) -> Tensor:
        calls.append(part.shape)
        return torch.cat([part, part[:, :1] + len(calls)], dim=1)

    found = slide(images, predict, 48, 32)
    assert torch.allclose(found[:, :3], images, atol=1e-6)  # a prediction of each pixel alone is unchanged
    sums, counts = torch.zeros(70, 100), torch.zeros(70, 100)
    for number, (left, top, right, bottom) in enumerate(plain_windows(70, 100, 48, 32), 1):
        sums[top:bottom, left:right] += number
        counts[top:bottom, left:right] += 1
    assert torch.allclose(found[:, 3], images[:, 0] + sums / counts, atol=1e-5)
    assert all(shape == (2, 3, 48, 48) for shape in calls)


def test_batches_and_their_parts() -> None:
    samples = [
        Sample(torch.full((3, 32, 64), 1.0), torch.zeros(30, 60, dtype=torch.uint8)),
        Sample(torch.full((3, 64, 32), 2.0), torch.zeros(50, 20, dtype=torch.uint8)),
    ]
    batch = collate_label_maps(samples).to(torch.device("cpu"))
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.sum() == 3 * 32 * 64 * (1 + 2)
    assert [labels.shape for labels in batch.labels] == [(30, 60), (50, 20)]
    assert [part.images.shape for part in batch.split(1)] == [(1, 3, 64, 64)] * 2
    alone = batch.one_by_one()
    assert [part.images.shape for part in alone] == [(1, 3, 32, 64), (1, 3, 64, 32)]
    assert all(isinstance(part, LabelBatch) and part.size == 1 for part in alone)


def test_a_crop_that_is_no_multiple_is_refused(make_config: MakeConfig) -> None:
    options: dict[str, Any] = {"crop": 500}
    with pytest.raises(ValueError, match="the crop of segmentation is 500; allowed: multiples of 32"):
        segmentation_pipeline(make_config("any"), INFO, "train", SegmentationSizes(**options))
