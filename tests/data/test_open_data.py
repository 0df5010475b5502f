"""The contract that both kinds of data keep: facts, order, determinism, shares, messages."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.config import RunConfig
from mpvg.data import DATASETS, Batches, Data, DataInfo, Shard, make_preprocess, open_data
from mpvg.data.named_sets import read_digits
from mpvg.data.order import BatchOrder
from mpvg.seeding import derive_seed

CPU = torch.device("cpu")
KINDS = ("fashion-mnist", "cifar10", "folder", "points")
AUGMENT = {
    "crop_padding": 2,
    "hflip": 0.5,
    "erase": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
}
Opener = Callable[..., Data]


@pytest.fixture
def opener(request: pytest.FixtureRequest, make_config: Callable[..., RunConfig]) -> Opener:
    """Opens a small data set of the parametrized kind."""
    kind: str = request.param

    def open_kind(rank: int = 0, world_size: int = 1, **options: object) -> Data:
        if kind == "folder":
            options = {"data": request.getfixturevalue("image_folder"), "img_size": 16, **options}
        elif kind == "cifar10":
            options = {"data": "cifar10", "root": request.getfixturevalue("cifar_folder").parent, **options}
        elif kind == "fashion-mnist":
            options = {"data": kind, "root": request.getfixturevalue("fashion_folder"), **options}
        else:
            make_pipeline = request.getfixturevalue("points")
            return open_data(make_config(kind, **options), Shard(CPU, rank, world_size), make_pipeline)
        return open_data(make_config(**options), Shard(CPU, rank, world_size))

    return open_kind


every_kind = pytest.mark.parametrize("opener", KINDS, indirect=True)


def read(batches: Batches[Any], epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(epoch, start))


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second)
    for (images_a, targets_a), (images_b, targets_b) in zip(first, second, strict=True):
        assert torch.equal(images_a, images_b)
        assert torch.equal(targets_a, targets_b)


@every_kind
def test_batches_have_the_promised_form(opener: Opener) -> None:
    data = opener(**AUGMENT)
    info = data.info
    assert len(data.train) == info.train_size // 8
    assert len(data.val) == -(-info.val_size // 8)
    for batches in (data.train, data.val):
        read_batches = read(batches)
        assert len(read_batches) == len(batches)
        for images, targets in read_batches:
            assert images.shape == (len(targets), info.in_chans, info.img_size, info.img_size)
            assert images.dtype == torch.float32
            assert images.isfinite().all()
            if info.class_names:
                assert targets.dtype == torch.int64
                assert targets.min() >= 0
                assert targets.max() < info.num_classes
            else:
                assert targets.dtype == torch.float32
                assert torch.equal(targets[:, 0], targets[:, -1])  # of the sample drawn, and told to the device
        assert batches.skipped == 0
    assert all(len(targets) == 8 for _, targets in read(data.train))


@every_kind
def test_info_is_json_safe(opener: Opener) -> None:
    info = opener().info
    values = json.loads(json.dumps(dataclasses.asdict(info)))
    assert DataInfo(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}) == info
    assert info.num_classes == len(info.class_names)
    assert len(info.mean) == len(info.std) == info.in_chans


@every_kind
def test_epoch_is_a_pure_function_of_seed_and_epoch(opener: Opener) -> None:
    data = opener(**AUGMENT)
    first = read(data.train, 3)
    read(data.train, 1)
    assert_same(first, read(data.train, 3))
    assert_same(first, read(opener(**AUGMENT).train, 3))
    assert not torch.equal(first[0][0], read(data.train, 4)[0][0])
    assert not torch.equal(first[0][0], read(opener(seed=1, **AUGMENT).train, 3)[0][0])


@every_kind
def test_augmentation_differs_between_epochs_for_the_same_image(opener: Opener) -> None:
    options = {**AUGMENT, "batch_size": 2}
    by_image: list[set[bytes]] = []
    data = opener(**options)
    for epoch in (0, 1):
        by_image.append({image.numpy().tobytes() for images, _ in read(data.train, epoch) for image in images})
    assert len(by_image[0] & by_image[1]) < 0.5 * len(by_image[0])


@every_kind
def test_start_equals_skipping(opener: Opener) -> None:
    data = opener(**AUGMENT)
    for batches in (data.train, data.val):
        whole = read(batches, 2)
        for start in (1, 2):
            assert_same(whole[start:], read(batches, 2, min(start, len(batches))))
        assert read(batches, 2, len(batches)) == []


@every_kind
def test_start_out_of_range_is_refused(opener: Opener) -> None:
    train = opener().train
    for start in (-1, len(train) + 1):
        with pytest.raises(ValueError, match=rf"start is {start}; .* allowed: 0 to {len(train)}"):
            read(train, 0, start)


@every_kind
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_same_global_batches(opener: Opener, world_size: int) -> None:
    whole = read(opener(**AUGMENT).train, 1)
    shares = [read(opener(rank, world_size, **AUGMENT).train, 1) for rank in range(world_size)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shares, strict=True)]
    assert all(len(targets) == 8 // world_size for _, targets in shares[0])
    assert_same(whole, joined)


@every_kind
def test_validation_reads_each_sample_once(opener: Opener) -> None:
    images, targets = (torch.cat(parts) for parts in zip(*read(opener().val), strict=True))
    assert len(targets) == opener().info.val_size
    for rank in range(2):
        share = [torch.cat(parts) for parts in zip(*read(opener(rank, 2).val), strict=True)]
        assert torch.equal(share[0], images[rank::2])
        assert torch.equal(share[1], targets[rank::2])


@every_kind
def test_validation_is_neither_shuffled_nor_augmented(opener: Opener) -> None:
    assert_same(read(opener().val, 0), read(opener(**AUGMENT).val, 5))


@every_kind
def test_training_reads_distinct_samples(opener: Opener) -> None:
    data = opener(batch_size=2, crop_scale=(1.0, 1.0))
    seen = {image.numpy().tobytes() for images, _ in read(data.train) for image in images}
    assert len(seen) >= 0.9 * data.info.train_size


@every_kind
def test_processes_must_divide_the_batch(opener: Opener) -> None:
    with pytest.raises(ValueError, match="batch_size 8 is not divisible by the number of processes, 3; "):
        opener(0, 3)


@every_kind
def test_batch_larger_than_the_training_set_is_refused(opener: Opener) -> None:
    size = opener().info.train_size
    assert len(opener(batch_size=size).train) == 1
    with pytest.raises(ValueError, match=f"batch_size {size + 1} is larger than the training set, {size} images"):
        opener(batch_size=size + 1)


def test_more_processes_than_validation_images() -> None:
    shares = [
        list(BatchOrder(size=3, batch_size=4, shuffle=False, seed=0, rank=r, world_size=4).batches(0, 0))
        for r in range(4)
    ]
    assert [[batch.tolist() for batch in share] for share in shares] == [[[0]], [[1]], [[2]], []]


def test_digits_are_scikit_learns_in_256_levels() -> None:
    from sklearn.datasets import load_digits

    gray = (load_digits().images * (255 / 16)).round().astype("uint8")
    contents = read_digits(None, ("train", "val"))
    assert contents.train
    assert contents.val
    images = torch.cat([contents.train.images, contents.val.images])
    assert sorted(image.numpy().tobytes() for image in images) == sorted(image.tobytes() for image in gray)


@pytest.mark.parametrize("img_size", [None, 12])
def test_digits_preprocess_is_what_validation_does(make_config: Callable[..., RunConfig], img_size: int | None) -> None:
    data, val = open_data(make_config(img_size=img_size), Shard(CPU)), read_digits(None, ("val",)).val
    assert val
    preprocess = make_preprocess(data.info)
    for (images, targets), pixels, same in zip(read(data.val), val.images.split(8), val.targets.split(8), strict=True):
        assert torch.equal(images, torch.stack([preprocess(Image.fromarray(image[0].numpy())) for image in pixels]))
        assert torch.equal(targets, same)


@pytest.mark.parametrize("img_size", [None, 20, 48])
def test_cifar_preprocess_is_what_validation_does(
    make_config: Callable[..., RunConfig], cifar_folder: Path, img_size: int | None
) -> None:
    data = open_data(make_config("cifar10", root=cifar_folder, img_size=img_size), Shard(CPU))
    raw = torch.frombuffer(bytearray((cifar_folder / "test_batch.bin").read_bytes()), dtype=torch.uint8)
    pixels = raw.view(-1, 3073)[:, 1:].view(-1, 3, 32, 32).permute(0, 2, 3, 1).numpy()
    ours = torch.stack([make_preprocess(data.info)(Image.fromarray(image)) for image in pixels])
    assert torch.equal(ours, torch.cat([images for images, _ in read(data.val)]))
    assert data.info.img_size == (img_size or 32)


def test_normalized_digits_are_standard(make_config: Callable[..., RunConfig]) -> None:
    data = open_data(make_config(batch_size=1437), Shard(CPU))
    (images, _) = read(data.train)[0]
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert (data.info.train_size, data.info.val_size) == (1437, 360)


def test_digits_split_has_the_same_share_of_each_digit(make_config: Callable[..., RunConfig]) -> None:
    counts = torch.cat([targets for _, targets in read(open_data(make_config(), Shard(CPU)).val)]).bincount()
    assert counts.sum() == 360
    assert counts.min() >= 35
    assert counts.max() <= 37


@pytest.mark.parametrize("img_size", [None, 20])
def test_preprocess_takes_any_size_and_mode(
    make_config: Callable[..., RunConfig], cifar_folder: Path, image_folder: Path, img_size: int | None
) -> None:
    for config in (
        make_config(img_size=img_size),
        make_config("cifar10", root=cifar_folder, img_size=img_size),
        make_config(image_folder, img_size=img_size),
    ):
        data = open_data(config, Shard(CPU))
        preprocess = pickle.loads(pickle.dumps(make_preprocess(data.info)))
        for mode in ("L", "RGB", "RGBA", "P", "CMYK"):
            image = preprocess(Image.new(mode, (50, 31)))
            assert image.shape == (data.info.in_chans, data.info.img_size, data.info.img_size)
            assert image.dtype == torch.float32


def test_white_and_black_are_normalized_with_the_published_numbers(
    make_config: Callable[..., RunConfig], cifar_folder: Path
) -> None:
    preprocess = make_preprocess(open_data(make_config("cifar10", root=cifar_folder), Shard(CPU)).info)
    white, black = (preprocess(Image.new("RGB", (32, 32), color))[:, 0, 0] for color in ("white", "black"))
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(white, (1 - mean) / std)
    torch.testing.assert_close(black, -mean / std)


def test_unknown_name_suggests_the_nearest(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match=r"data 'cifar-10' is neither .* did you mean cifar10 .*allowed: digits"):
        open_data(make_config("cifar-10"), Shard(CPU))
    with pytest.raises(
        ValueError, match=r"allowed: digits, .*hfds/<Hugging Face data set>, or the path of a folder with"
    ):
        open_data(make_config("qqqqqq"), Shard(CPU))


def test_the_names() -> None:
    names = "digits fashion-mnist cifar10 cifar100 canvas-tiles canvas-tiles-garments cells cells-garments"
    assert " ".join(DATASETS) == names


def test_derived_seeds_differ() -> None:
    parts = [(a, b, c) for a in ("order", "sample") for b in range(30) for c in range(30)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed("order", 1, 23) != derive_seed("order", 12, 3)
    assert all(0 <= derive_seed(*part) < 2**32 for part in parts)


def test_orders_of_neighboring_epochs_are_unrelated() -> None:
    order = BatchOrder(size=1000, batch_size=1000, shuffle=True, seed=0, rank=0, world_size=1)
    orders = [next(order.batches(epoch, 0)) for epoch in range(4)]
    assert all(sorted(o.tolist()) == list(range(1000)) for o in orders)
    assert all((a == b).float().mean() < 0.02 for a, b in pairwise(orders))


def test_smaller_images_are_antialiased_as_in_pil(make_config: Callable[..., RunConfig]) -> None:
    data = open_data(make_config(img_size=8), Shard(CPU))
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (50, 37), generator=generator, dtype=torch.uint8).numpy())
    expected = functional.pil_to_tensor(image.resize((8, 8), Image.Resampling.BILINEAR)).float()
    gray = 255 * (make_preprocess(data.info)(image) * data.info.std[0] + data.info.mean[0])
    assert (gray - expected).abs().max() < 1.01  # a gray level, for the rounding between the two passes
