"""Augmentation against timm and PIL image by image, and the distributions of its decisions."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.config import AugmentConfig
from mpvg.data import DataInfo
from mpvg.data.device_augment import GEOMETRIC, OPS, DeviceAugment, RandAugment, apply_ops, crop_and_flip, erase

CPU = torch.device("cpu")
# PIL cuts what it interpolates and we round it; the others compute in another precision before they cut.
ONE_LEVEL_OFF = ("AutoContrast", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
TOLERANCE = dict.fromkeys((*ONE_LEVEL_OFF, *GEOMETRIC), 1)
# No round numbers: at those, the edge of the image meets the center of a pixel, and the last bit decides.
LEVELS = (0.0, 0.083, 0.283, 0.483, 0.583, 0.783, 0.983, 1.0)


def make_images(chans: int, side: int = 20, count: int = 4) -> Tensor:
    """Smooth random images (B, C, S, S), uint8, with one flat and one low-contrast image."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, chans, 6, 6), generator=generator, dtype=torch.uint8)
    images = functional.resize(coarse, [side, side], antialias=True)
    images[-1] = 77
    images[-2] = images[-2] // 4 + 90
    return images


def make_info(chans: int = 1, side: int = 20, size: int = 100) -> DataInfo:
    mean, std = (0.5, 0.4, 0.3)[:chans], (0.25, 0.2, 0.3)[:chans]
    return DataInfo(
        name="x", class_names=("a",), in_chans=chans, img_size=side, mean=mean, std=std, train_size=size, val_size=1
    )


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def timm_op(name: str, image: Tensor, level: float, sign: int, fill: tuple[int, ...]) -> Tensor:
    """The op as timm carries it out on a PIL image."""
    convert = timm_augment.LEVEL_TO_ARG[name]
    arguments = convert(10 * level, timm_augment._HPARAMS_DEFAULT) if convert else ()
    color: Any = fill if len(image) == 3 else fill[0]
    out = timm_augment.NAME_TO_OP[name](to_pil(image), *arguments, resample=Image.Resampling.BILINEAR, fillcolor=color)
    return functional.pil_to_tensor(out)


def test_ops_are_timms_increasing_ones() -> None:
    assert set(OPS) == set(timm_augment._RAND_INCREASING_TRANSFORMS)
    assert len(OPS) == 15


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_op_equals_timm_on_pil(name: str, chans: int, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    fill = (140, 90, 60)[:chans]
    images = make_images(chans)
    for level in LEVELS:
        one = torch.ones(len(images))
        color = torch.tensor(fill).float()
        ours = apply_ops(images.float(), one.long() * OPS.index(name), level * one, sign * one, color)
        theirs = torch.stack([timm_op(name, image, level, sign, fill) for image in images]).float()
        assert (ours - theirs).abs().max() <= TOLERANCE.get(name, 0), f"level {level}"
        assert torch.equal(ours, ours.round())
        assert 0 <= ours.min() <= ours.max() <= 255


@pytest.mark.parametrize("name", OPS)
def test_op_does_something(name: str) -> None:
    """Guards the comparison above: an op that leaves all images alone would be compared with nothing."""
    images = make_images(3).float()
    one = torch.ones(len(images))
    ours = apply_ops(images, one.long() * OPS.index(name), 0.9 * one, one, torch.zeros(3))
    assert (ours[0] - images[0]).abs().mean() > 0.5


def test_color_leaves_grey_images_alone() -> None:
    images = make_images(1).float()
    one = torch.ones(len(images))
    ours = apply_ops(images, one.long() * OPS.index("ColorIncreasing"), one, one, torch.zeros(1))
    assert torch.equal(ours, images)


def test_mixed_batch_equals_ops_one_by_one() -> None:
    images = make_images(3, count=40).float()
    generator = torch.Generator().manual_seed(1)
    op = torch.randint(0, 2 * len(OPS), (40,), generator=generator)
    level = torch.rand(40, generator=generator)
    sign = torch.where(torch.rand(40, generator=generator) < 0.5, -1.0, 1.0)
    fill = torch.tensor([10.0, 20.0, 30.0])
    together = apply_ops(images, op, level, sign, fill)
    for n in range(40):
        alone = apply_ops(images[n : n + 1], op[n : n + 1], level[n : n + 1], sign[n : n + 1], fill)
        assert torch.equal(together[n : n + 1], alone)
    assert torch.equal(together[op >= len(OPS)], images[op >= len(OPS)])


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-inc1", "rand-inc1", "rand-inc1-mstd1-m5", "rand-n1-m15-inc1"]
)
def test_parse_means_what_timm_means(text: str) -> None:
    ours = RandAugment.parse(text)
    theirs = timm_augment.rand_augment_transform(text, {})
    op = theirs.ops[0]
    assert (ours.magnitude, ours.ops, ours.std) == (op.magnitude, theirs.num_layers, op.magnitude_std)
    assert {o.name for o in theirs.ops} == set(OPS)
    assert op.prob == 0.5
    assert op.magnitude_max is None


@pytest.mark.parametrize(
    "text",
    ["rand-m9-mstd0.5", "rand-m9-inc0", "rand-m9.5-inc1", "rand-m9-mstd101-inc1", "rand-m9-inc1-p0.7", "augmix-m3",
     "original", "rand-m9-m8-inc1", "rand-x-inc1", "rand-m-inc1"],
)  # fmt: skip
def test_parse_refuses_what_is_not_built(text: str) -> None:
    with pytest.raises(ValueError, match=f"augment.auto_augment is '{text}'; allowed .*rand-m9-n2-mstd0.5-inc1"):
        RandAugment.parse(text)


def test_each_op_is_drawn_alike_and_half_of_the_time_none() -> None:
    uniform = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    half = torch.full_like(uniform, 0.5)
    op, _, _ = RandAugment().decide(uniform, half, half)
    shares = op.clamp(max=15).bincount(minlength=16) / len(op)
    assert abs(shares[15] - 0.5) < 0.005
    assert (shares[:15] - 1 / 30).abs().max() < 0.002


def test_level_and_sign_are_distributed_as_in_timm() -> None:
    uniform = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    _, level, sign = RandAugment(9, 2, 0.5).decide(uniform[0], uniform[0], uniform[1])
    random.seed(0)
    theirs = torch.tensor([max(0.0, min(random.gauss(9, 0.5), 10.0)) / 10 for _ in range(100_000)])
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert abs(level.quantile(share) - theirs.quantile(share)) < 2e-3
    assert abs(sign.mean()) < 0.02
    assert set(sign.unique().tolist()) == {-1.0, 1.0}
    _, fixed, _ = RandAugment(7, 2, 0.0).decide(uniform[0], uniform[0], uniform[1])
    assert torch.equal(fixed, torch.full_like(fixed, 0.7))


@pytest.mark.parametrize("chans", [1, 3])
def test_crop_and_flip_equal_torchvision(chans: int) -> None:
    images = make_images(chans, side=9, count=50)
    draws = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    flip = torch.arange(50) % 2 == 0
    ours = crop_and_flip(images, 3, draws[0], draws[1], flip)
    for n, image in enumerate(images):
        top, left = int(draws[0, n] * 7), int(draws[1, n] * 7)
        expected = functional.crop(functional.pad(image, [3, 3, 3, 3]), top, left, 9, 9)
        assert torch.equal(ours[n], functional.hflip(expected) if flip[n] else expected)


def test_crop_reaches_every_place_and_none_beyond() -> None:
    image = torch.ones(1, 1, 4, 4, dtype=torch.uint8).expand(500, -1, -1, -1)
    draws = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    draws[:, :2] = torch.tensor([1e-6, 1 - 1e-6])
    areas = crop_and_flip(image, 2, draws[0], draws[1], torch.zeros(500, dtype=torch.bool)).sum((1, 2, 3))
    assert set(areas.tolist()) == {a * b for a in (2, 3, 4) for b in (2, 3, 4)}


def erased(count: int, side: int, probability: float) -> tuple[Tensor, Tensor]:
    """Erases zeros; returns the images and where they changed, (B, S, S)."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(6, count, generator=generator).clamp(1e-6, 1 - 1e-6)
    bank = torch.randn(10_000 + 3 * side * side, generator=generator)
    images = erase(torch.zeros(count, 3, side, side), probability, list(draws), bank)
    return images, (images != 0).all(dim=1)


def test_erased_part_is_one_rectangle_of_2_to_33_percent() -> None:
    _, mask = erased(2000, 40, 1.0)
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    area = mask.sum((1, 2))
    assert torch.equal(area, height * width)  # filled rectangles, nothing else
    share = area / 1600
    assert 0.015 < share.min() < 0.03
    assert 0.3 < share.max() < 0.35
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.01
    aspect = (height / width).log()
    assert aspect.min() > math.log(0.25)
    assert aspect.max() < math.log(4)
    assert abs(aspect.mean()) < 0.05
    assert abs(aspect.std() - 2 * math.log(10 / 3) / math.sqrt(12)) < 0.05


def test_erasing_reaches_all_sides() -> None:
    _, mask = erased(2000, 12, 1.0)
    hits = mask.float().mean(0)
    assert hits.min() > 0
    torch.testing.assert_close(hits, hits.flip(0), atol=0.05, rtol=0)
    torch.testing.assert_close(hits, hits.T, atol=0.05, rtol=0)


def test_erasing_noise_is_standard_normal_and_differs_between_images() -> None:
    images, mask = erased(500, 40, 1.0)
    values = images.permute(0, 2, 3, 1)[mask]
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert (values[:, 0] * values[:, 1]).mean().abs() < 0.03  # channels are independent
    assert len({image.numpy().tobytes() for image in images}) == 500


def test_erasing_rate() -> None:
    images, _ = erased(4000, 10, 0.25)
    assert abs((images != 0).flatten(1).any(1).float().mean() - 0.25) < 0.02


@pytest.mark.parametrize(("hflip", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.27, 0.33), (1.0, 1.0, 1.0)])
def test_flip_rate(hflip: float, low: float, high: float) -> None:
    augment = DeviceAugment(AugmentConfig(hflip=hflip), make_info(side=4, size=5000), 0, CPU)
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(5000, -1, -1, -1)
    out = augment(image, augment.draw(0))
    flipped = out[:, 0, 0, 0] > out[:, 0, 0, 3]
    assert low <= flipped.float().mean() <= high


def test_table_depends_on_seed_and_epoch_only() -> None:
    config = AugmentConfig(auto_augment="rand-m9-n3-mstd0.5-inc1")
    table = DeviceAugment(config, make_info(), 0, CPU).draw(1)
    assert table.shape == (9 + 3 * 3, 100)
    assert table.min() > 0
    assert table.max() < 1
    assert torch.equal(table, DeviceAugment(config, make_info(), 0, CPU).draw(1))
    for seed, epoch in ((0, 2), (1, 1)):
        assert not torch.equal(table, DeviceAugment(config, make_info(), seed, CPU).draw(epoch))
    correlation = np.corrcoef(DeviceAugment(config, make_info(size=5000), 0, CPU).draw(0).numpy())
    assert np.abs(correlation - np.eye(18)).max() < 0.06  # no number is used for two decisions


@pytest.mark.parametrize("chans", [1, 3])
def test_sample_is_augmented_alike_in_any_batch(chans: int) -> None:
    config = AugmentConfig(crop_padding=2, hflip=0.5, erase=0.5, auto_augment="rand-m9-mstd0.5-inc1")
    augment = DeviceAugment(config, make_info(chans, size=64), 0, CPU)
    images, table = make_images(chans, count=64), augment.draw(0)
    whole = augment(images, table)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    pieces = [augment(images[part], table[:, part]) for part in order.split(7)]
    assert torch.equal(torch.cat(pieces), whole[order])


def test_nothing_asked_for_is_plain_normalization() -> None:
    info = make_info(3, size=4)
    augment = DeviceAugment(AugmentConfig(), info, 0, CPU)
    images = make_images(3)
    mean, std = (torch.tensor(value)[:, None, None] for value in (info.mean, info.std))
    torch.testing.assert_close(augment(images, augment.draw(0)), (images / 255 - mean) / std)


@pytest.mark.parametrize("option", ["crop_padding", "hflip", "erase", "auto_augment"])
def test_each_option_changes_images(option: str) -> None:
    value: Any = {"crop_padding": 2, "auto_augment": "rand-m9-inc1"}.get(option, 0.5)
    info = make_info(size=40)
    images = make_images(1, count=40)
    plain, other = (
        DeviceAugment(config, info, 0, CPU) for config in (AugmentConfig(), AugmentConfig(**{option: value}))
    )
    table = other.draw(0)
    changed = (plain(images, table) != other(images, table)).flatten(1).any(1)
    assert 5 < changed.sum() < 40


def test_randaugment_fills_with_the_mean() -> None:
    images = torch.zeros(200, 3, 20, 20, dtype=torch.uint8)
    info = make_info(3, size=200)
    augment = DeviceAugment(AugmentConfig(auto_augment="rand-m9-n1-inc1"), info, 0, CPU)
    out = augment(images, augment.draw(0))
    mean, std = (torch.tensor(value)[:, None, None] for value in (info.mean, info.std))
    levels = ((out * std + mean) * 255).round()
    fill = torch.tensor([round(255 * value) for value in info.mean])
    assert (levels == fill[:, None, None]).all(dim=1).any()
