"""Data that were changed under a run are noticed, and the first difference is named."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpvg.config import RunConfig
from mpvg.data import Shard, open_data, open_listing
from mpvg.data.inventory import Inventory, first_difference
from mpvg.runs import Run, create_run, load
from mpvg.training import resume, train

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture
def run(image_folder: Path, tmp_path: Path, make_config: MakeConfig) -> Run:
    """A run on a folder, whose training has not begun."""
    config = replace(make_config(image_folder, img_size=8), model="vit_mini_patch2_8", out=str(tmp_path / "run"))
    data = open_data(config, Shard(CPU))
    create_run(config, data.info, data.inventories)
    return load(tmp_path / "run")


def check(run: Run) -> None:
    """What a resume does."""
    run.check_samples(open_data(run.config, Shard(CPU)).inventories)


def add(folder: Path) -> None:
    shutil.copy(folder / "a/0.png", folder / "a/0b.png")


def remove(folder: Path) -> None:
    (folder / "b/1.JPG").unlink()


def append(folder: Path) -> None:
    shutil.copy(folder / "a/0.png", folder / "c/9.png")


def replace_one(folder: Path) -> None:
    (folder / "b/0.png").write_bytes((folder / "b/0.png").read_bytes() + b"\0")


def rename(folder: Path) -> None:
    (folder / "b/1.JPG").rename(folder / "b/1b.JPG")


def move(folder: Path) -> None:
    (folder / "a/0.png").rename(folder / "b/00.png")


def swap(folder: Path) -> None:
    replace_one(folder)  # or both would be of one size
    for one, two in (("a/0.png", "x"), ("b/0.png", "a/0.png"), ("x", "b/0.png")):
        (folder / one).rename(folder / two)


CHANGES: dict[Callable[[Path], None], str] = {
    add: r"a/0b\.png is new or was elsewhere \(it is sample 1\)",
    remove: r"b/1\.JPG is gone \(it was sample \d+, which is \w/\d\.\w+ now\)",
    append: r"c/9\.png is new or was elsewhere \(it is sample (24|7)\)",
    replace_one: r"b/0\.png has \d+ bytes and had \d+",
    rename: r"b/1\.JPG is gone \(it was sample \d+, which is b/1b\.JPG now\)",
    move: r"a/0\.png is gone \(it was sample 0, which is a/1\.JPG now\)",
    swap: r"a/0\.png has \d+ bytes and had \d+",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_change_of_a_folder_is_refused_naming_the_first_difference(
    split: str, change: Callable[[Path], None], run: Run, image_folder: Path
) -> None:
    check(run)
    assert len(run.validation(CPU)) == 1
    change(image_folder / split)
    message = rf"the {split} samples of .*images are not those that .*run was trained on: {CHANGES[change]}; restore"
    with pytest.raises(ValueError, match=message):
        check(run)
    if split == "val":
        with pytest.raises(ValueError, match=message):
            run.validation(CPU)
    else:
        assert len(run.validation(CPU)) == 1  # of the training set evaluation needs nothing


def test_the_last_image_is_named_when_it_is_gone(run: Run, image_folder: Path) -> None:
    max((image_folder / "train/c").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"trained on: c/5\.jpeg is gone \(it was sample 23, of fewer now\); restore"):
        check(run)


def test_a_resume_is_refused(run: Run, image_folder: Path) -> None:
    replace_one(image_folder / "train")
    with pytest.raises(ValueError, match=r"the train samples of .* are not those that .* was trained on: b/0\.png has"):
        resume(run.path, quiet=True)


def test_a_new_run_keeps_what_it_was_trained_on_and_says_what_it_leaves_out(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(run.config, out=str(tmp_path / "new"), batch_size=16, device="cpu", lr=1e-3)
    train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1
    assert said[0].startswith("8 of 24 images are left out of each epoch")
    assert "a batch_size of 12 leaves out 0" in said[0]
    trained = load(tmp_path / "new")
    assert (trained.info.train_hash, trained.info.val_hash) == (run.info.train_hash, run.info.val_hash)
    lines = [
        gzip.decompress((tmp_path / f"new/listing-{s}.txt.gz").read_bytes()).count(b"\n") for s in ("train", "val")
    ]
    assert lines == [24, 7]
    train(replace(config, out=str(tmp_path / "newer"), batch_size=12))
    assert "left out" not in capsys.readouterr().out


def test_other_data_are_not_compared(run: Run, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "other")
    remove(tmp_path / "other/val")
    assert len(run.validation(CPU, data=str(tmp_path / "other"))) == 1


def test_data_may_be_moved_touched_or_linked(run: Run, image_folder: Path, tmp_path: Path) -> None:
    for path in image_folder.rglob("*"):
        os.utime(path, (0, 0))
    image_folder.rename(tmp_path / "elsewhere")
    image_folder.symlink_to(tmp_path / "elsewhere")
    check(run)


def test_a_run_made_before_compares_nothing(run: Run, image_folder: Path) -> None:
    info = json.loads((run.path / "data.json").read_text())
    assert len({info.pop("train_hash"), info.pop("val_hash")}) == 2
    (run.path / "data.json").write_text(json.dumps(info))
    for file in run.path.glob("listing-*"):
        file.unlink()
    replace_one(image_folder / "train")
    replace_one(image_folder / "val")
    old = load(run.path)
    check(old)
    assert len(old.validation(CPU)) == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "pipe", "the same", "long line"])
def test_a_damaged_listing_is_no_reason_to_go_on(damage: str, run: Run, image_folder: Path) -> None:
    file = run.path / "listing-train.txt.gz"
    whole = file.read_bytes()
    replace_one(image_folder / "train")
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[:20])
    elif damage == "text":
        file.write_text("no listing")
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "the same":
        file.write_bytes(open_data(run.config, Shard(CPU)).inventories["train"].packed)
    elif damage == "long line":
        file.write_bytes(gzip.compress(b"\0" * 2**24))
    with pytest.raises(ValueError, match=r"the train samples of .* are not those that .* was trained on: .*; restore"):
        check(run)


def test_samples_in_memory_are_compared_by_their_bytes(
    cifar_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    config = replace(make_config("cifar10", root=cifar_folder), out=str(tmp_path / "run"))
    data = open_data(config, Shard(CPU))
    run = create_run(config, data.info, data.inventories)
    check(run)
    file = cifar_folder / "data_batch_2.bin"
    content = bytearray(file.read_bytes())
    for byte, message in ((3073 * 3 + 7, "number 13 has other contents"), (3073 * 3, r"number 13 is of class \d and")):
        changed = content.copy()
        changed[byte] = (changed[byte] + 1) % 10
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"the train samples of cifar10 are not those .*: {message}"):
            check(run)


def test_a_format_without_an_inventory_is_not_compared(
    points: Callable[..., object], tmp_path: Path, make_config: MakeConfig
) -> None:
    config = replace(make_config("points"), out=str(tmp_path / "run"))
    data = open_data(config, Shard(CPU), points)
    assert (data.info.train_hash, data.info.val_hash) == (None, None)
    run = create_run(config, data.info, data.inventories)
    run.check_samples(data.inventories)


NAMES = ["a\nb", "a\tb", "a\\nb", "\udcff", "é"]


def test_odd_names_stay_apart() -> None:
    hashes = {Inventory.of([0], [1], [name]).hash for name in NAMES}
    assert len(hashes) == len(NAMES)
    one, other = (Inventory.of(range(5), [7] * 5, names) for names in (NAMES, [*NAMES[:4], "e\u0301"]))
    assert "é is gone (it was sample 4" in first_difference(one.packed, other)


def test_the_same_samples_give_the_same_bytes(image_folder: Path, make_config: MakeConfig) -> None:
    one, other = (open_listing(make_config(image_folder)).inventories["val"] for _ in range(2))
    assert one == other
    lines = gzip.decompress(one.packed).decode().splitlines()
    assert lines[0] == f"0\t{(image_folder / 'val/a/0.png').stat().st_size}\ta/0.png"
    assert len(lines) == 7
    assert np.unique([line.split("\t")[0] for line in lines]).tolist() == ["0", "1", "2"]
