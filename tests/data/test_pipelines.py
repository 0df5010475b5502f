"""Named sets through timm's transforms, repeated augmentation, and the crop at evaluation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, RunConfig
from mpvg.data import Data, Shard, make_preprocess, open_data
from mpvg.data.order import BatchOrder

CPU = torch.device("cpu")


@pytest.fixture
def config(cifar_folder: Path) -> RunConfig:
    return RunConfig(
        data="cifar10",
        model="m",
        epochs=1,
        batch_size=8,
        lr=1e-3,
        recipe="r",
        network=NetworkConfig(crop_pct=1.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
        augment=AugmentConfig(pipeline="timm", crop_scale=(0.8, 1.0), hflip=0.5, interpolation="random"),
        loader=LoaderConfig(root=str(cifar_folder.parent), workers=0),
    )


def opened(config: RunConfig, **changes: object) -> Data:
    return open_data(replace(config, **changes), Shard(CPU))


def test_a_named_set_goes_through_timms_transforms(config: RunConfig) -> None:
    """Evaluation is timm's own transform on the same pixels, with the mean, deviation and crop that were asked for."""
    data, raw = opened(config), opened(replace(config, augment=AugmentConfig(), network=NetworkConfig()))
    transform = create_transform(32, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=1.0)
    images, targets = (torch.cat(parts) for parts in zip(*data.val.epoch(), strict=True))
    info = raw.info
    tensors, same = (torch.cat(parts) for parts in zip(*raw.val.epoch(), strict=True))
    assert torch.equal(targets, same)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    for image, tensor in zip(images, tensors, strict=True):
        pixels = (255 * (tensor * std + mean)).round().byte()
        pil = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        assert torch.equal(image, transform(pil))
        assert torch.equal(image, make_preprocess(data.info)(pil))


def test_its_batches_are_the_same_bits_twice_from_the_middle_and_with_workers(config: RunConfig) -> None:
    whole = list(opened(config).train.epoch(2))
    again = list(opened(replace(config, loader=replace(config.loader, workers=2))).train.epoch(2, 1))
    for (images, targets), (same, too) in zip(whole[1:], again, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, too)
    other = next(iter(opened(config).train.epoch(3)))
    assert not torch.equal(whole[0][0], other[0])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_interpolation_reaches_the_crop(config: RunConfig, interpolation: str) -> None:
    first = [
        next(iter(opened(config, augment=replace(config.augment, interpolation=value)).train.epoch()))[0]
        for value in ("random", interpolation)
    ]
    assert not torch.equal(first[0], first[1])


def test_the_crop_at_evaluation_is_the_share_that_was_asked_for(config: RunConfig) -> None:
    """At crop_pct 0.5 only the middle half of an image is left."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[16:48, 16:48] = 255
    seen = [
        make_preprocess(opened(config, network=replace(config.network, crop_pct=pct)).info)(Image.fromarray(pixels))
        for pct in (1.0, 0.5)
    ]
    assert seen[0].std() > 1
    assert seen[1].amin(dim=(1, 2)) == pytest.approx(seen[1].amax(dim=(1, 2)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_repeated_image_stands_side_by_side_and_is_shared_out(world_size: int) -> None:
    """As DeiT's sampler: the drawn order, each three times, cut to the epoch's length, dealt out to the processes."""
    orders = [
        BatchOrder(size=50, batch_size=8, shuffle=True, seed=1, rank=r, world_size=world_size, repeats=3)
        for r in range(world_size)
    ]
    dealt = [torch.cat(list(order.batches(epoch=4, start=0))) for order in orders]
    together = torch.stack(dealt, dim=1).flatten()
    assert len(together) == 48
    drawn = next(iter(BatchOrder(size=50, batch_size=50, shuffle=True, seed=1, rank=0, world_size=1).batches(4, 0)))
    assert torch.equal(together % 50, drawn.repeat_interleave(3)[:48])
    assert torch.equal(together // 50, torch.arange(48) % 3)  # which copy it is
    for order, all_of_it in zip(orders, dealt, strict=True):
        assert torch.equal(torch.cat(list(order.batches(4, 2))), all_of_it[2 * 8 // world_size :])


def test_copies_of_an_image_are_augmented_differently(config: RunConfig) -> None:
    config = replace(config, augment=replace(config.augment, repeats=2, crop_scale=(0.1, 0.5)))
    images, targets = next(iter(opened(config).train.epoch()))
    assert torch.equal(targets[::2], targets[1::2])
    assert all(not torch.equal(one, other) for one, other in zip(images[::2], images[1::2], strict=True))
    every = [image.numpy().tobytes() for images, _ in opened(config).train.epoch() for image in images]
    assert max(Counter(every).values()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": AugmentConfig(repeats=3)}, r"augment\.repeats is 3, but .*; give --augment\.pipeline timm"),
        (
            {"data": "digits", "network": NetworkConfig()},
            r"augment\.pipeline is 'timm', .* digits is gray",
        ),
        ({"network": NetworkConfig(std=(0.5,))}, r"network\.std is \(0\.5,\); allowed for cifar10: 3 number"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(config: RunConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(config, **change)
