"""Small data sets in the real layouts, and the config of a run."""

import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, RunConfig
from mpvg.data import (
    Batches,
    DataInfo,
    ImageBatch,
    Listing,
    Pipeline,
    Sample,
    Shard,
    describe,
    factory,
    loader,
    open_listing,
    open_split,
    register_format,
)
from mpvg.data.types import DeviceTransform, Split
from short_runs import write_cifar10

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
    return write_cifar10(tmp_path / "cifar-10-batches-bin")


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """Fashion-MNIST's files with 30 training and 20 test images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    for stem, size in (("train", 30), ("t10k", 20)):
        pixels, targets = rng.integers(0, 256, (size, 28, 28), np.uint8), rng.integers(0, 10, size, np.uint8)
        header = struct.pack(">4I", 0x803, size, 28, 28)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, size) + targets.tobytes())
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


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sends all that the workers get through pickle, as a spawned worker has it; bytes of each set, in turn."""
    sizes: list[int] = []

    def send(dataset: Any, *, collate_fn: Any, **options: Any) -> DataLoader[Any]:
        sent = pickle.dumps(dataset)
        sizes.append(len(sent))
        return DataLoader(pickle.loads(sent), collate_fn=pickle.loads(pickle.dumps(collate_fn)), **options)

    monkeypatch.setattr(loader, "DataLoader", send)
    return sizes


OpenVal = Callable[[RunConfig, tuple[str, ...] | None], tuple[Listing, Batches[Any]]]


@pytest.fixture
def open_val() -> OpenVal:
    """Opens the validation set alone, as the evaluation of a run with these classes does."""

    def opener(config: RunConfig, class_names: tuple[str, ...] | None) -> tuple[Listing, Batches[Any]]:
        listing = open_listing(config, ("val",), class_names)
        assert listing.train is None
        return listing, open_split(listing, "val", Shard(torch.device("cpu")), config, describe(config, listing))

    return opener


@dataclass(frozen=True)
class Points:
    """Samples of a format of its own: an image of noise, and a vector that begins with the sample's number."""

    size: int
    unreadable: Sequence[int] = ()

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"point {index}"

    def read(self, index: int) -> Sample:
        if index in self.unreadable:
            raise OSError("it has faded")
        pixels = np.random.default_rng(index).random((3, 6, 6), np.float32)
        return Sample(torch.from_numpy(pixels), (float(index), 0.5, -1.0))


def with_noise(sample: Sample) -> Sample:
    return sample._replace(image=sample.image + torch.rand(3, 6, 6))


def stack_vectors(samples: list[Sample]) -> ImageBatch:
    return ImageBatch(torch.stack([s.image for s in samples]), torch.tensor([s.target for s in samples]))


def add_numbers(epoch: int) -> DeviceTransform:
    """Adds to each target what the loader says: the epoch, and the number that was drawn."""

    def transform(batch: ImageBatch, chosen: Tensor) -> ImageBatch:
        told = torch.stack([torch.full_like(chosen, epoch), chosen], dim=1).float()
        return batch._replace(targets=torch.cat([batch.targets, told], dim=1))

    return transform


def vector_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
    if split == "train":
        return Pipeline(with_noise, stack_vectors, device_transform=add_numbers)
    return Pipeline(partial(Sample._replace), stack_vectors, device_transform=lambda epoch: add_numbers(0))


@pytest.fixture
def points() -> Iterator[Callable[..., Any]]:
    """The pipeline of the registered format "points": 30 training and 13 validation samples.

    In "points/3,4" those numbers of both splits cannot be read.
    """

    def open_points(config: RunConfig, splits: Sequence[Split], class_names: tuple[str, ...] | None) -> Listing:
        _, _, rest = config.data.partition("/")
        unreadable = [int(number) for number in rest.split(",") if rest]
        sources = {split: Points({"train": 30, "val": 13}[split], unreadable) for split in splits}
        return Listing(class_names=(), img_size=6, **sources)

    register_format("points", open_points)
    yield vector_pipeline
    del factory._FORMATS["points"]  # there is no other way back
