"""Small data sets in the real layouts, and the config of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, RunConfig

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """Builds a RunConfig from the parts that the data see."""

    def make(
        data: object = "digits",
        *,
        batch_size: int = 8,
        seed: int = 0,
        img_size: int | None = None,
        root: Path | None = None,
        workers: int = 0,
        skip_corrupt: bool = False,
        **augment: Any,
    ) -> RunConfig:
        loader = LoaderConfig(root=None if root is None else str(root), workers=workers, skip_corrupt=skip_corrupt)
        return RunConfig(
            data=str(data),
            model="any",
            epochs=1,
            batch_size=batch_size,
            lr=1.0,
            seed=seed,
            out="unused",
            recipe="none",
            network=NetworkConfig(img_size=img_size),
            augment=AugmentConfig(**augment),
            loader=loader,
        )

    return make


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """CIFAR-10's binary version with 5 x 10 training and 13 test images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, size in [*((f"data_batch_{n}", 10) for n in range(1, 6)), ("test_batch", 13)]:
        records = rng.integers(0, 256, (size, 3073), dtype=np.uint8)
        records[:, 0] = rng.integers(0, 10, size)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Folders a, b and c with 24 training and 7 validation images of different shapes and kinds."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for split, sizes in (("train", (10, 8, 6)), ("val", (4, 2, 1))):
        for name, size in zip("abc", sizes, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(size):
                pixels = rng.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
                suffix = ("png", "JPG", "jpeg")[number % 3]
                Image.fromarray(pixels).save(folder / split / name / f"{number}.{suffix}")
    return folder
