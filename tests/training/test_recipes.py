"""Every recipe, found by its registry, trains a step on files in the layout of the real set."""

import gzip
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpvg import create_model, runs
from mpvg.config import RunConfig
from mpvg.data import cells, named_sets
from mpvg.recipes import RECIPES, recipe
from mpvg.training import train
from short_runs import write_cifar10

RNG = np.random.default_rng(0)


def write_digits(root: Path) -> Path:
    """Nothing: the real set is part of scikit-learn."""
    return root


def write_fashion_mnist(root: Path) -> Path:
    for stem, size in (("train", 16), ("t10k", 5)):
        images = struct.pack(">4I", 0x803, size, 28, 28) + RNG.bytes(size * 28 * 28)
        labels = struct.pack(">2I", 0x801, size) + bytes([8, *RNG.integers(0, 10, size - 1, dtype=np.uint8)])  # a bag
        (root / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    return root


def write_cifar100(root: Path) -> Path:
    for name, size in (("train", 16), ("test", 5)):
        records = RNG.integers(0, 256, (size, 2 + 3072), dtype=np.uint8)
        records[:, 0] %= 20
        records[:, 1] %= 100
        (root / f"{name}.bin").write_bytes(records.tobytes())
    (root / "fine_label_names.txt").write_text("\n".join(f"class-{n}" for n in range(100)) + "\n")
    return root


def write_folder(root: Path) -> Path:
    for split, size in (("train", 4), ("val", 2)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for number in range(size):
                pixels = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "digits": write_digits,
    "fashion-mnist": write_fashion_mnist,
    "cifar10": lambda root: write_cifar10(root, batch=4, test=5),
    "cifar100": write_cifar100,
    "cells": write_digits,
    "cells-garments": write_fashion_mnist,
    "folder": write_folder,
    "finetune": write_folder,
    "deit_tiny": write_folder,
    "deit_small": write_folder,
    "deit_base": write_folder,
    "swin_tiny": write_folder,
    "ceit_tiny": write_folder,
    "t2t_vit_7": write_folder,
    "vit_lite_7_cifar100": write_cifar100,
    "t2t_vit_7_cifar100": write_cifar100,
    "canvas-tiles": write_digits,
}
SMALLER = dict.fromkeys(("deit_small", "deit_base"), "deit_tiny_patch16_224")
"""Of the same family, in place of networks whose steps and files would take most of a minute."""
FOLDERS = [name for name, write in LAYOUTS.items() if write is write_folder]


DENSE = {name for name, make in RECIPES.items() if make().task != "classification"}
"""Tested with their tasks, in tests/tasks."""


def test_every_recipe_has_its_files_here() -> None:
    assert LAYOUTS.keys() == RECIPES.keys() - DENSE


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_recipe_trains_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "SIZES", {"train": 16, "val": 16})
    monkeypatch.setattr(named_sets, "TILES", {"train": 16, "val": 16})
    root = LAYOUTS[name](tmp_path)
    config = recipe(name, str(root) if name in FOLDERS else None)
    with torch.device("meta"):
        create_model(config.model, config.method, num_classes=2, drop_path_rate=config.network.drop_path)
    steps = 1 if name != "digits" else 2
    size = 32 if name in FOLDERS or config.network.img_size else None  # 224 pixels would take minutes
    config = replace(
        config,
        model=SMALLER.get(name, config.model),
        epochs=1,
        batch_size=718 if name == "digits" else 8 if name in FOLDERS else 16,
        device="cpu",
        precision="fp32",
        threads=1,
        out=str(tmp_path / "run"),
        loader=replace(config.loader, root=str(root), workers=0),
        network=replace(config.network, img_size=size),
        optim=replace(config.optim, warmup_epochs=0, cooldown_epochs=0, schedule_lag=0),
    )
    summary = train(config, quiet=True)
    run = runs.load(tmp_path / "run")
    assert [line["step"] for line in run.metrics()] == [steps]
    assert summary["recipe"] == name
    assert np.isfinite([summary["nll"], run.metrics()[0]["train_loss"]]).all()
    assert ("ema_nll" in summary) == (config.ema_decay is not None)
    assert run.config == config
    start = run.task().build_model(init=False).state_dict()
    assert any(not (value == start[key]).all() for key, value in run.model().state_dict().items())


def test_a_data_set_finds_its_own_recipe_and_a_folder_the_one_for_folders() -> None:
    for name in ("digits", "fashion-mnist", "cifar10", "cifar100", "cells", "cells-garments", "folder"):
        assert recipe(None, name) == recipe(name) == RECIPES[name]()
    assert recipe() == RECIPES["digits"]()
    assert recipe(None, "finetune") == replace(RECIPES["folder"](), data="finetune")  # a folder of this name
    assert recipe(None, "some/folder") == replace(RECIPES["folder"](), data="some/folder")
    assert recipe("cifar10", "some/folder") == replace(RECIPES["cifar10"](), data="some/folder")


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="unknown recipe 'cifar'; did you mean .*cifar10.* Known: digits, fashion-mnist"
    ):
        recipe("cifar", "digits")


def test_a_recipe_is_a_fresh_config() -> None:
    config: RunConfig = RECIPES["digits"]()
    assert config == RECIPES["digits"]()
    with pytest.raises(AttributeError):
        config.lr = 1.0
