"""imbalance and subtract_mean, against counts and means that are computed here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpvg.config import RunConfig
from mpvg.data import DataInfo, Shard, denormalize, make_preprocess, open_data, open_listing
from mpvg.data.named_sets import read_digits
from mpvg.data.tensors import TensorSource, make_imbalanced

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Any:
    return read_digits(None, ("train", "val"))


def numbers(source: Any) -> list[bytes]:
    return [image.tobytes() for image in source.images.numpy()]


@pytest.mark.parametrize("imbalance", [1.0, 5.0, 20.0, 1e6])
def test_classes_shrink_in_a_geometric_series(
    make_config: Callable[..., RunConfig], digits: Any, imbalance: float
) -> None:
    config = replace(make_config(), imbalance=imbalance)
    listing: Any = open_listing(config)
    counts, complete = listing.train.targets.bincount(), digits.train.targets.bincount()
    if imbalance == 1:
        assert torch.equal(counts, complete)
    else:
        smallest = int(complete.min())
        expected = [max(1.0, np.floor(smallest * (1 / imbalance) ** (c / 9) + 1e-9)) for c in range(10)]
        assert counts.tolist() == expected
    assert torch.equal(listing.val.images, digits.val.images)
    assert (listing.inventories["train"].hash == open_listing(make_config()).inventories["train"].hash) == (
        imbalance == 1
    )


def test_the_first_of_each_class_are_kept_in_their_order(make_config: Callable[..., RunConfig], digits: Any) -> None:
    few, fewer = (numbers(open_listing(replace(make_config(), imbalance=x)).train) for x in (5.0, 50.0))
    places = {image: place for place, image in enumerate(numbers(digits.train))}
    assert [places[i] for i in few] == sorted(places[i] for i in few)
    assert set(fewer) < set(few)
    last = [n for n, target in enumerate(digits.train.targets.tolist()) if target == 9]
    kept = [places[image] for image in few]
    assert [n for n in last if n in kept] == last[: len([n for n in last if n in kept])]


def test_hand_computed_counts() -> None:
    targets = torch.tensor([0] * 12 + [1] * 10 + [2] * 11)
    source = TensorSource(torch.zeros(33, 1, 1, 1, dtype=torch.uint8), targets)
    assert make_imbalanced(source, 3, 4.0).targets.bincount().tolist() == [10, 5, 2]
    assert make_imbalanced(source, 3, 1000.0).targets.bincount().tolist() == [10, 1, 1]


@pytest.mark.parametrize(("name", "value"), [("imbalance", 2.0), ("subtract_mean", True)])
def test_files_are_refused(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str, value: float | bool
) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}, but data .* is no named set; allowed for: digits"):
        open_listing(replace(make_config(tmp_path), **{name: value}))


def validation(config: RunConfig) -> tuple[DataInfo, torch.Tensor]:
    data = open_data(config, Shard(CPU))
    return data.info, torch.cat([batch.images for batch in data.val.epoch()])


@pytest.mark.parametrize("imbalance", [1.0, 10.0])
def test_the_mean_of_the_training_set_is_subtracted(
    make_config: Callable[..., RunConfig], digits: Any, imbalance: float
) -> None:
    plain = replace(make_config(), imbalance=imbalance)
    config = replace(plain, subtract_mean=True)
    kept: Any = open_listing(plain).train
    mean = kept.images.double().mean(dim=0)
    info, images = validation(config)
    expected = (digits.val.images.double() - mean) / 255 / 0.3760
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-5)
    assert info.mean == (0.0,)
    torch.testing.assert_close(denormalize(images, info).double() * 255, digits.val.images.double(), rtol=0, atol=1e-3)
    train = torch.cat(
        [batch.images for batch in open_data(replace(config, batch_size=len(kept)), Shard(CPU)).train.epoch()]
    )
    assert train.mean(dim=0).abs().max() < 1e-5


def test_augmentation_comes_after_it(make_config: Callable[..., RunConfig]) -> None:
    """Padding is then the mean image's, and a mirrored image is less a mirrored mean."""
    config = replace(make_config(batch_size=1437, hflip=1.0), subtract_mean=True)

    def first(config: RunConfig) -> torch.Tensor:
        batch: torch.Tensor = next(open_data(config, Shard(CPU)).train.epoch()).images
        return batch

    straight = first(replace(config, augment=replace(config.augment, hflip=0.0)))
    assert torch.equal(first(config), straight.flip(-1))
    padded = first(replace(config, augment=replace(config.augment, hflip=0.0, crop_padding=8)))
    far = padded.flatten(1).eq(0).all(dim=1)
    assert far.any()  # moved out of sight: 2 of 17 x 17 places, or more where its border is empty


def test_other_sizes_are_resized_first(make_config: Callable[..., RunConfig], digits: Any) -> None:
    info, images = validation(replace(make_config(img_size=16), subtract_mean=True))
    plain_info, plain = validation(make_config(img_size=16))
    shift = (plain * plain_info.std[0] + plain_info.mean[0]) - images * info.std[0]
    assert (shift - shift[:1]).abs().max() < 1e-5
    mean = digits.train.images.double().mean(dim=0)
    assert abs(float(shift[0].mean()) * 255 - float(mean.mean())) < 1
    torch.testing.assert_close(denormalize(images, info), denormalize(plain, plain_info), rtol=0, atol=1e-5)


@pytest.mark.parametrize("img_size", [None, 16])
def test_prediction_prepares_an_image_as_validation_does(
    make_config: Callable[..., RunConfig], digits: Any, img_size: int | None
) -> None:
    info, images = validation(replace(make_config(img_size=img_size), subtract_mean=True))
    image = Image.fromarray(digits.val.images[3, 0].numpy())
    assert torch.equal(make_preprocess(info)(image), images[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_augment": "rand-m9-inc1"}, r"auto_augment is 'rand-m9-inc1'.* subtract_mean makes them negative"),
        ({"pipeline": "timm"}, r"go through augment.pipeline 'timm'"),
    ],
)
def test_what_the_mean_image_does_not_allow(
    make_config: Callable[..., RunConfig], cifar_folder: Path, change: dict[str, str], message: str
) -> None:
    config = replace(make_config("cifar10", root=cifar_folder, **change), subtract_mean=True)
    with pytest.raises(ValueError, match=message):
        open_data(config, Shard(CPU))


def test_a_mean_beside_it_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    config = replace(config, subtract_mean=True, network=replace(config.network, mean=(0.5,)))
    with pytest.raises(ValueError, match=r"network.mean is \(0.5,\), but subtract_mean leaves a mean of 0"):
        open_data(config, Shard(CPU))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 6, 12])
def test_a_mean_image_of_no_square_is_refused(make_config: Callable[..., RunConfig], count: int) -> None:
    info = open_data(make_config(), Shard(CPU)).info
    if count in (1, 4):
        assert replace(info, mean_image=(1.0,) * count).mean_image is not None
    else:
        with pytest.raises(ValueError, match=rf"mean_image has {count} numbers; allowed: 1 x S x S"):
            replace(info, mean_image=(1.0,) * count)
