"""Sets in which the place is the class: the class is where the item is, and nothing else tells it."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mpvg.config import RunConfig
from mpvg.data import Shard, open_data
from mpvg.data.cells import SIDE, SIZES, Cells
from mpvg.data.factory import SPLITS
from mpvg.data.named_sets import NAMED_SETS, read_digits
from mpvg.data.types import Contents, Tensors

Array = npt.NDArray[Any]
CPU = torch.device("cpu")


def cut(images: Array) -> Array:
    """Grids `(N, 1, S, S)` as cells `(N, 16, s, s)`, row by row, by a plain loop."""
    side = images.shape[-1] // SIDE
    parts = [
        images[:, 0, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(SIDE)
        for column in range(SIDE)
    ]
    return np.stack(parts, axis=1)


@pytest.fixture(scope="module")
def made() -> Contents:
    return NAMED_SETS["cells"].read(None, SPLITS)


@pytest.fixture(scope="module")
def digits() -> Contents:
    return read_digits(None, SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_class_is_the_cell_of_the_only_zero(made: Contents, digits: Contents, split: str) -> None:
    source, grids = getattr(digits, split), getattr(made, split)
    kinds: dict[bytes, int] = {
        image.tobytes(): int(kind) for image, kind in zip(source.images.numpy(), source.targets, strict=True)
    }
    found = [[kinds[cell.tobytes()] for cell in row] for row in cut(grids.images.numpy())]
    zeros = np.array(found) == 0
    assert (zeros.sum(axis=1) == 1).all()
    assert (zeros.argmax(axis=1) == grids.targets.numpy()).all()
    assert set(np.array(found).flatten()) == set(range(10))
    assert made.class_names[int(grids.targets[0])] == (
        f"row {zeros[0].argmax() // SIDE + 1}, column {zeros[0].argmax() % SIDE + 1}"
    )


def test_training_and_validation_share_no_scan(made: Contents) -> None:
    train, val = (
        {cell.tobytes() for row in cut(part.images.numpy()) for cell in row} for part in (made.train, made.val)
    )
    assert len(train) > 1000
    assert len(val) > 300
    assert not train & val


def test_the_same_pixels_everywhere(made: Contents) -> None:
    assert hashlib.sha256(made.train.images.numpy().tobytes()).hexdigest()[:16] == "dbea8ad2f3a822b4"
    assert hashlib.sha256(made.val.images.numpy().tobytes()).hexdigest()[:16] == "1a89ad372d00f544"
    alone = NAMED_SETS["cells"].read(None, ("val",))
    assert alone.train is None
    assert torch.equal(alone.val.images, made.val.images)


def test_all_classes_are_equally_many_in_an_order_without_a_pattern(made: Contents) -> None:
    for split, part in zip(SPLITS, (made.train, made.val), strict=True):
        assert part.targets.bincount().tolist() == [SIZES[split] // 16] * 16
        steps = (part.targets[1:] - part.targets[:-1]) % 16
        assert steps.bincount().max() < 3 * len(steps) / 16


def read_linearly(train: Array, targets: Array, val: Array) -> Array:
    """The classes that a ridge regression on standardized features predicts."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-9
    x, y = (train - mean) / std, np.eye(16)[targets]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (y - 1 / 16))
    return np.asarray(((val - mean) / std @ weights).argmax(axis=1))


def test_what_is_in_the_patches_says_nothing_about_the_class(made: Contents) -> None:
    def features(part: Tensors, *, as_a_bag: bool) -> Array:
        """How like the mean zero each cell is; sorted, and with the mean patch beside, for a bag of patches."""
        cells = cut(part.images.numpy()).reshape(len(part.images), 16, -1).astype(float)
        likeness: Array = (cells * zero).sum(axis=2) / np.linalg.norm(cells, axis=2)
        return np.concatenate([np.sort(likeness, axis=1), cells.mean(axis=1)], axis=1) if as_a_bag else likeness

    own = cut(made.train.images.numpy())[np.arange(len(made.train.targets)), made.train.targets.numpy()]
    zero = own.mean(axis=0).flatten()
    targets = made.val.targets.numpy()
    hits = {
        bag: (
            read_linearly(
                features(made.train, as_a_bag=bag), made.train.targets.numpy(), features(made.val, as_a_bag=bag)
            )
            == targets
        ).mean()
        for bag in (False, True)
    }
    chance, deviation = 1 / 16, (1 / 16 * 15 / 16 / len(targets)) ** 0.5
    assert hits[False] > 0.5
    assert abs(hits[True] - chance) < 4 * deviation


def source(kinds: list[int], side: int = 4) -> Contents:
    images = torch.arange(len(kinds) * side * side).reshape(-1, 1, side, side) % 251
    part = Tensors(images.to(torch.uint8), torch.tensor(kinds))
    return Contents(("a", "b"), train=part, val=part)


def test_items_are_shrunk_to_means_of_squares() -> None:
    grids = Cells(lambda root, splits: source([0, 1]), wanted=1, shrink=2)(None, ("train",)).train
    assert grids.images.shape == (SIZES["train"], 1, 4 * 2, 4 * 2)
    # Image 1 holds 16 to 31, four in a row: the upper left square is 16, 17, 20, 21.
    cell = cut(grids.images.numpy())[0, int(grids.targets[0])]
    assert cell.tolist() == [[18, 20], [26, 28]]


@pytest.mark.parametrize("kinds", [[0, 0], [1, 1]])
def test_a_set_without_the_item_or_without_others_is_refused(kinds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"val has \d images of 'b' and \d of other classes, and cells need both"):
        Cells(lambda root, splits: source(kinds), wanted=1)(None, ("val",))


def test_it_opens(make_config: Callable[..., RunConfig]) -> None:
    data = open_data(make_config("cells", batch_size=64, erase=0.25, mixup=0.8), Shard(CPU))
    assert (data.info.in_chans, data.info.img_size, data.info.num_classes) == (1, 32, 16)
    images = torch.cat([batch.images for batch in data.val.epoch()])
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("name", "value"), [("hflip", 0.5), ("crop_padding", 2), ("auto_augment", "rand-m9-mstd0.5-inc1")]
)
def test_what_moves_the_item_is_refused(make_config: Callable[..., RunConfig], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"augment.{name} is .* in cells the place is the class; leave it out"):
        open_data(make_config("cells", **{name: value}), Shard(CPU))
