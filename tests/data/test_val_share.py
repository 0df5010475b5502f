"""A validation set that is held out of the training set, by a hash of names."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from image_trees import make_folder, pack
from mpvg.config import ADDED_FIELDS, RunConfig
from mpvg.data import Shard, open_data, open_listing
from mpvg.data.folder import Paths
from mpvg.data.listing import Found, Listing, hold_out
from mpvg.data.rules import Names
from mpvg.runs import Run

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
SIZES = {"ant": 100, "bee": 60, "cat": 2, "dog": 1}
FILES = [f"{name}/{number}.png" for name, size in SIZES.items() for number in range(size)]


def names(listing: Listing, split: str) -> list[str]:
    """Class and file of each image, from the end of its path."""
    source = listing.source(split)
    return ["/".join(source.name(index).split(" in ")[0].split("/")[-2:]) for index in range(len(source))]


def make(root: Path, form: str, files: list[str] = FILES) -> Path:
    if form == "flat":
        return make_folder(root, {"": files})
    make_folder(root, {"train": files})
    return root if form == "train/" else pack(root, root.with_name(root.name + "-tar"), splits=("train",))


@pytest.mark.parametrize("form", ["flat", "train/", "train.tar"])
def test_every_form_is_split_alike(form: str, tmp_path: Path, make_config: MakeConfig) -> None:
    config = replace(make_config(make(tmp_path / "data", form)), val_share=0.2)
    listing = open_listing(config)
    train, val = names(listing, "train"), names(listing, "val")
    assert sorted(train + val) == sorted(FILES)
    held_out, kept = (Counter(name.split("/")[0] for name in part) for part in (val, train))
    assert (held_out["cat"], kept["cat"], held_out["dog"], kept["dog"]) == (1, 1, 0, 1)
    reference = open_listing(replace(make_config(make(tmp_path / "other", "flat")), val_share=0.2))
    assert (train, val) == (names(reference, "train"), names(reference, "val"))
    for split in ("train", "val"):
        source = listing.source(split)
        expected = [listing.class_names.index(name.split("/")[0]) for name in names(listing, split)]
        assert [source.read(index).target for index in range(len(source))] == expected
    assert names(open_listing(config, ("val",), listing.class_names), "val") == val
    assert names(open_listing(config, ("train",)), "train") == train


def test_a_share_is_held_out_of_each_class() -> None:
    """4 standard deviations at most from what is asked for: one of 10,000 hashes would not hold it."""
    count, share = 4000, 0.1
    found = Found(
        where="here",
        classes=("a", "b"),
        titles=("a", "b"),
        labels=np.arange(2 * count) % 2,
        names=[f"{number}.png" for number in range(2 * count)],
        sizes=np.zeros(2 * count, dtype=np.int64),
        files=Paths("here", Names(map(str, range(2 * count)))),
    )
    train, val = hold_out(found, share)
    for label in (0, 1):
        assert abs((val.labels == label).sum() - share * count) < 4 * (count * share * (1 - share)) ** 0.5
    assert sorted([*train.files.names, *val.files.names], key=int) == [*map(str, range(2 * count))]  # type: ignore[attr-defined]
    assert all(int(name[:-4]) % 2 == label for name, label in zip(val.names, val.labels.tolist(), strict=True))


def test_images_stay_where_they_are_when_others_are_added_or_removed(tmp_path: Path, make_config: MakeConfig) -> None:
    config = replace(make_config(make(tmp_path / "data", "flat")), val_share=0.2)
    before = names(open_listing(config), "val")
    make_folder(tmp_path / "data", {"": [f"ant/new-{number}.png" for number in range(50)] + ["zoo/0.png", "zoo/1.png"]})
    (tmp_path / "data/bee/0.png").unlink()
    after = names(open_listing(config), "val")
    assert [name for name in after if "new" not in name and "zoo" not in name] == [
        n for n in before if n != "bee/0.png"
    ]
    assert 3 <= sum("new" in name for name in after) <= 20
    assert sum("zoo" in name for name in after) == 1


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_every_class_of_two_keeps_one_on_either_side(share: float, tmp_path: Path, make_config: MakeConfig) -> None:
    config = replace(make_config(make(tmp_path / "data", "flat")), val_share=share)
    for split, without in (("train", set()), ("val", {"dog"})):
        assert {name.split("/")[0] for name in names(open_listing(config), split)} == SIZES.keys() - without


def test_larger_shares_hold_out_the_same_and_more(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(make(tmp_path / "data", "flat"))
    parts = [set(names(open_listing(replace(config, val_share=share)), "val")) for share in (0.1, 0.3, 0.6)]
    assert parts[0] < parts[1] < parts[2]


@pytest.mark.parametrize("form", ["flat", "train/", "train.tar"])
def test_without_a_share_the_refusal_names_it(form: str, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(make(tmp_path / "data", form))
    with pytest.raises(FileNotFoundError, match=r"val.*; or hold out a share of train: --val_share 0\.1$"):
        open_data(config, Shard(CPU))
    if form != "flat":
        assert len(open_listing(config, ("train",)).source("train")) == len(FILES)


def test_a_share_of_data_that_have_a_validation_set_is_refused(
    image_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    for path in (image_folder, pack(image_folder, tmp_path / "packed")):
        config = replace(make_config(path), val_share=0.1)
        with pytest.raises(ValueError, match=r"val_share is 0\.1, but data '.*' have a validation split of .*; leave"):
            open_listing(config)
    with pytest.raises(ValueError, match=r"val_share is 0\.1, but data 'digits' have a validation split"):
        open_listing(replace(make_config("digits"), val_share=0.1))


def test_a_run_with_a_share_is_evaluated_on_what_was_held_out_or_on_other_data(
    image_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    shutil.move(image_folder / "val", tmp_path / "other/val")
    config = replace(make_config(image_folder, img_size=8), val_share=0.3)
    data = open_data(config, Shard(CPU))
    run = Run(Path("the run"), config, data.info)
    held_out, mine = list(data.val.epoch()), list(run.validation(CPU).epoch())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(held_out, mine, strict=True))
    assert sum(len(targets) for _, targets in run.validation(CPU, data=str(tmp_path / "other")).epoch()) == 7


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_that_cannot_be_is_refused(share: float, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"val_share is .*; allowed: a number in \[0, 1\)"):
        replace(make_config(), val_share=share)


def test_the_share_is_part_of_the_digest_and_older_runs_had_none(make_config: MakeConfig) -> None:
    config = make_config()
    assert ADDED_FIELDS["val_share"] == 0.0
    assert config.digest() == replace(config, val_share=0.0).digest() != replace(config, val_share=0.1).digest()
    values = config.to_dict()
    del values["val_share"]
    assert RunConfig.from_dict(values) == config


def test_a_flat_folder_of_one_class_too_few_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    make_folder(
        tmp_path / "data", {"": [f"set/{split}/{number}.png" for split in ("train", "val") for number in range(5)]}
    )
    config = replace(make_config(tmp_path / "data"), val_share=0.5)
    with pytest.raises(ValueError, match=r"has one class only, 'set'.*its folders train, val lie one level too deep"):
        open_listing(config)
