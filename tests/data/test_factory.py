"""Formats of one's own, parts of a split, and what is common to all formats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpvg.config import RunConfig
from mpvg.data import (
    Batches,
    Data,
    Listing,
    Shard,
    describe,
    image_pipeline,
    open_data,
    open_listing,
    open_split,
    register_format,
)
from mpvg.data.tensors import TensorSource

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture
def open_points(points: Callable[..., Any], make_config: MakeConfig) -> Callable[..., Data]:
    def opener(data: str = "points", rank: int = 0, world_size: int = 1, **options: Any) -> Data:
        return open_data(make_config(data, **options), Shard(CPU, rank, world_size), points)

    return opener


def read(batches: Batches[Any], epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(epoch, start))


def assert_same(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    for (images, targets), (same, too) in zip(some, others, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, too)


def drawn(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The numbers of the samples, which `Points` writes into their targets."""
    return torch.cat([targets for _, targets in batches])[:, 0].int().tolist()


def test_a_format_is_shuffled_sharded_and_resumed_as_every_other(open_points: Callable[..., Data]) -> None:
    whole = read(open_points().train, 2)
    assert sorted(drawn(whole)) != drawn(whole)
    assert len(set(drawn(whole))) == 24  # three batches of 8; the rest of 30 is dropped
    assert drawn(whole) != drawn(read(open_points().train, 3))
    shares = [read(open_points(rank=rank, world_size=2, workers=rank).train, 2, 1) for rank in (0, 1)]
    joined = [tuple(map(torch.cat, zip(one, two, strict=True))) for one, two in zip(*shares, strict=True)]
    assert_same(joined, whole[1:])
    assert all(targets[:, 3].unique().tolist() == [2.0] for _, targets in whole)  # the device is told the epoch
    scored = [drawn(read(open_points(rank=rank, world_size=2).val)) for rank in (0, 1)]
    assert scored == [list(range(0, 13, 2)), list(range(1, 13, 2))]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sample_of_a_format_that_cannot_be_read_is_named(open_points: Callable[..., Data], split: str) -> None:
    message = r"^image point 3 cannot be read \(OSError: it has faded\); replace it, or skip such images"
    with pytest.raises(ValueError, match=message):
        read(getattr(open_points("points/3", workers=1, batch_size=1), split))


def test_samples_of_a_format_that_cannot_be_read_are_skipped(open_points: Callable[..., Data]) -> None:
    data = open_points("points/3,4,29", skip_corrupt=True, batch_size=5, workers=1)
    whole = open_points(batch_size=5)
    for (_, targets), (_, others) in zip(read(data.train), read(whole.train), strict=True):
        assert torch.equal(targets[:, 4], others[:, 4])  # of the numbers drawn
        expected = [{3: 5, 4: 5, 29: 0}.get(number, number) for number in others[:, 0].int().tolist()]
        assert targets[:, 0].int().tolist() == expected
    found = read(data.val)
    assert drawn(found) == [number for number in range(13) if number not in (3, 4)]
    assert all(torch.equal(targets[:, 0], targets[:, 4]) for _, targets in found)  # the device is told who is left
    assert (data.train.skipped, data.val.skipped) == (3, 2)


@pytest.mark.parametrize("name", ["points", "digits", "hfds", "", ".", "..", "a/b"])
def test_a_name_that_is_taken_or_not_valid_is_refused(points: Any, name: str) -> None:
    def never(*arguments: Any) -> Listing:
        raise AssertionError

    with pytest.raises(ValueError, match=rf"data format '{name}': give a name without a slash .* hfds, .*points"):
        register_format(name, never)
    assert len(open_listing(RunConfig.from_dict(CONFIG)).source("train")) == 30


CONFIG = {"data": "points", "model": "m", "epochs": 1, "batch_size": 8, "lr": 1.0, "recipe": "r"}


def test_a_format_is_found_by_its_name_and_by_what_begins_with_it(points: Any, make_config: MakeConfig) -> None:
    for data in ("points", "points/"):
        listing = open_listing(make_config(data), ("val",))
        assert (listing.train, len(listing.source("val"))) == (None, 13)
    for data in ("pointsx", "point"):
        with pytest.raises(ValueError, match=r"did you mean points\? .*allowed: digits, .*, points, coco/"):
            open_listing(make_config(data))
    with pytest.raises(FileNotFoundError, match="data folder 'digits/more' does not exist"):
        open_listing(make_config("digits/more"))


def test_grey_images_of_a_format_need_a_pipeline_of_their_own(points: Any, make_config: MakeConfig) -> None:
    config = make_config("points")
    gray = replace(open_listing(config), in_chans=1, mean=(0.5,), std=(0.2,))
    info = describe(config, gray)
    with pytest.raises(ValueError, match="augment.pipeline is 'auto', .*; points is gray: its format needs a pipeline"):
        open_split(gray, "val", Shard(CPU), config, info)
    assert len(read(open_split(gray, "val", Shard(CPU), config, info, make_pipeline=points))) == 2


def test_the_fast_pipeline_needs_files(points: Any, make_config: MakeConfig) -> None:
    config = make_config("points", pipeline="fast")
    listing = open_listing(config)
    with pytest.raises(ValueError, match="augment.pipeline is 'fast', which reads image files, and points has none"):
        open_split(listing, "train", Shard(CPU), config, describe(config, listing), make_pipeline=image_pipeline)


@pytest.mark.parametrize("images", [1, 3, 7, 12, 13, 99])
@pytest.mark.parametrize("kind", ["cifar10", "points"])
def test_a_part_is_spread_evenly_over_the_split(
    kind: str, images: int, points: Any, cifar_folder: Path, make_config: MakeConfig
) -> None:
    """And in order, over two processes; nothing else is read."""
    expected = {1: [0], 3: [0, 4, 8], 7: [0, 1, 3, 5, 7, 9, 11], 12: list(range(12))}.get(images, list(range(13)))
    config = make_config(kind, root=cifar_folder)
    listing = open_listing(config, ("val",))
    make_pipeline = points if kind == "points" else image_pipeline
    opened = [
        open_split(
            listing, "val", Shard(CPU, rank, 2), config, describe(config, listing),
            make_pipeline=make_pipeline, images=images,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    whole = open_split(listing, "val", Shard(CPU), config, describe(config, listing), make_pipeline=make_pipeline)
    every = torch.cat([pixels for pixels, _ in read(whole)])
    for rank, part in enumerate(opened):
        batches = read(part)
        assert len(batches) == len(part)
        mine = expected[rank::2]
        assert torch.equal(torch.cat([pixels for pixels, _ in batches] or [every[:0]]), every[mine])
        if kind == "points" and mine:
            assert drawn(batches) == mine


@pytest.mark.parametrize("pipeline", ["auto", "fast"])
@pytest.mark.parametrize(("split", "images"), [("train", 8), ("val", 3)])
def test_of_a_part_no_other_file_is_opened(
    split: Any, images: int, pipeline: str, image_folder: Path, make_config: MakeConfig
) -> None:
    config = make_config(image_folder, img_size=16, pipeline=pipeline)
    listing = open_listing(config)
    count = len(listing.source(split))
    expected = list(range(0, count, count // images))[:images]
    for index in set(range(count)) - set(expected):
        Path(listing.source(split).name(index)).unlink()
    targets = torch.cat([t for _, t in read(open_part(listing, split, config, images))]).tolist()
    wanted = [int(listing.source(split).read(index).target) for index in expected]
    assert sorted(targets) == wanted if split == "train" else targets == wanted
    broken = listing.source(split).name(expected[1])
    Path(broken).write_bytes(b"")
    with pytest.raises(ValueError, match=f"image {broken} cannot be read"):
        read(open_part(listing, split, config, images))


def open_part(listing: Listing, split: Any, config: RunConfig, images: int) -> Batches[Any]:
    return open_split(listing, split, Shard(CPU), config, describe(config, listing), images=images)


def test_samples_in_memory_are_read_one_by_one_as_well() -> None:
    source = TensorSource(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([4, 7]))
    image, target = source.read(1)
    assert (source.name(1), len(source), target, image.getpixel((1, 0))) == ("number 1", 2, 7, (13, 17, 21))
