"""Folders of image files: train/ and val/, a folder a class in each; timm transforms, torch workers."""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from mpvg.config import AugmentConfig, LoaderConfig, RunConfig
from mpvg.data.contract import BatchOrder, Data, DataInfo, derive_seed

# By content, not by name: PIL would hand a PostScript file that is called .jpg to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_ASPECT = 1000

Transform = Callable[[Image.Image], Tensor]
Sample = tuple[Tensor | None, int, str]
"""Image (C, H, W) or None, its target, and what was wrong with an image that could not be read, or ''."""


def open_folder(config: RunConfig, *, device: torch.device, rank: int, world_size: int) -> Data:
    """Lists a folder's images and prepares to read them; arguments and errors as `open_data`."""
    root = Path(config.data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data folder {config.data!r} does not exist; give one with train/ and val/, and a folder a class in each"
        )
    class_names = _class_names(root / "train")
    train = _list_images(root / "train", class_names, class_names)
    val = _list_images(root / "val", _class_names(root / "val"), class_names)
    info = DataInfo(
        name=config.data,
        class_names=tuple(class_names),
        in_chans=3,
        img_size=config.network.img_size or 224,
        mean=config.network.mean or IMAGENET_DEFAULT_MEAN,
        std=config.network.std or IMAGENET_DEFAULT_STD,
        train_size=len(train),
        val_size=len(val),
    )
    augment = _train_transform(config.augment, info)
    preprocess = make_preprocess(info)
    order = partial(BatchOrder, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size)

    def batches(samples: list[tuple[str, int]], transform: Transform, shuffle: bool) -> FolderBatches:
        images = FolderImages(samples, transform, config.seed, replace=shuffle and config.loader.skip_corrupt)
        return FolderBatches(images, order(size=len(samples), shuffle=shuffle), config.loader, device)

    return Data(info, batches(train, augment, True), batches(val, preprocess, False), preprocess)


def make_preprocess(info: DataInfo) -> "Preprocess":
    """What validation does to an image: DeiT's resize (256 for 224) and centre crop."""
    return Preprocess(
        create_transform(info.img_size, interpolation="bicubic", mean=info.mean, std=info.std, crop_pct=0.875)
    )


class FolderBatches:
    """Batches of image files, decoded by worker processes that live as long as this object."""

    def __init__(self, images: "FolderImages", order: BatchOrder, config: LoaderConfig, device: torch.device) -> None:
        self.skipped = 0
        self._order, self._skip_corrupt, self._device = order, config.skip_corrupt, device
        self._passes = 0
        self._keys = _Keys(order)
        self._loader = DataLoader(
            images,
            batch_sampler=self._keys,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each pass would draw from the caller's global generator
        )

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`; a validation batch of which no image can be read is not yielded.

        Raises:
            ValueError: an image cannot be read.
            RuntimeError: another pass was begun before this one ended.
        """
        self._passes += 1
        this_pass = self._passes
        self._keys.epoch, self._keys.start = epoch, start
        for images, targets, failures in self._loader:
            if self._passes != this_pass:
                raise RuntimeError("another pass over the same split was begun; the workers serve one at a time")
            all_unreadable = self._order.shuffle and len(targets) == 0
            if failures and (all_unreadable or not self._skip_corrupt):
                raise ValueError(failures[0])
            self.skipped += len(failures)
            if len(targets):
                yield images.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)


class FolderImages(Dataset[Sample]):
    """Image files, each read and transformed with random numbers that depend on (seed, epoch, sample) only.

    Args:
        samples: file and target of each sample.
        transform: makes an RGB image into a tensor (C, H, W).
        seed: the run's seed.
        replace: read the next sample in place of one that cannot be read.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: Transform, seed: int, replace: bool) -> None:
        # An array, not a list: looking at a list's items writes their reference counts, and so each worker would
        # copy a million names.
        self._files = np.array([os.fsencode(file) for file, _ in samples])
        self._targets = np.array([target for _, target in samples])
        self._transform, self._seed, self._replace = transform, seed, replace

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: int) -> Sample:
        """Reads the sample `key` % N for the epoch `key` // N."""
        epoch, index = divmod(key, len(self))
        failure = ""
        for step in range(len(self) if self._replace else 1):
            place = (index + step) % len(self)
            file = os.fsdecode(self._files[place])
            try:
                image = read_image(file)
            except Exception as error:  # decoders of untrusted files raise whatever they stumble over
                failure = failure or (
                    f"image {file} cannot be read ({type(error).__name__}: {error}); "
                    "replace it, or --loader.skip_corrupt true leaves such images out"
                )
                continue
            with _seeded(derive_seed("sample", self._seed, epoch, index)):
                return self._transform(image), int(self._targets[place]), failure
        return None, 0, failure


@dataclass(frozen=True)
class Preprocess:
    """What validation does to an image, for an image of any size and mode."""

    transform: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalised image (C, H, W)."""
        return self.transform(image.convert("RGB"))


class _Keys(Sampler[list[int]]):
    """Batches of epoch * N + sample, so that a worker learns the epoch with the sample."""

    def __init__(self, order: BatchOrder) -> None:
        self.epoch, self.start = 0, 0
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self._order.size
        for chosen in self._order.batches(self.epoch, self.start):
            yield (first + chosen).tolist()


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Failures travel as text: an exception raised in a worker would reach the user under the worker's traceback."""
    failures = [failure for _, _, failure in samples if failure]
    images = [image for image, _, _ in samples if image is not None]
    targets = torch.tensor([target for image, target, _ in samples if image is not None], dtype=torch.int64)
    return default_collate(images) if images else torch.empty(0), targets, failures


def read_image(file: str) -> Image.Image:
    """Reads an image file whole, as RGB.

    Raises:
        OSError: it is missing, truncated or no image.
        ValueError: its sides are too unequal to be resized.
        Image.DecompressionBombWarning: it has too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            if max(image.size) > _MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width}x{image.height} is too long to be resized by its shorter side")
            return image.convert("RGB")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms use; without workers this is the main process, so they are put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _train_transform(config: AugmentConfig, info: DataInfo) -> Transform:
    no_jitter: Any = None  # timm's own value would switch it on wherever RandAugment is off
    try:
        transform: Transform = create_transform(
            info.img_size,
            is_training=True,
            mean=info.mean,
            std=info.std,
            scale=config.crop_scale,
            ratio=(3 / 4, 4 / 3),
            hflip=config.hflip,
            color_jitter=no_jitter,
            auto_augment=config.auto_augment,
            interpolation="bicubic",
            re_prob=config.erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"augment.auto_augment is {config.auto_augment!r}, which timm refuses ({error}); "
            "allowed: a string such as 'rand-m9-mstd0.5-inc1'"
        ) from error
    return transform


def _class_names(folder: Path) -> list[str]:
    """Names of the class folders, in timm's order (2 before 10)."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {str(folder)!r} is missing; data need train/ and val/, a folder a class in each"
        )
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise FileNotFoundError(f"folder {str(folder)!r} has no class folders; put the images of each class into one")
    return sorted(names, key=lambda name: (natural_key(name), name))


def _list_images(folder: Path, present: list[str], class_names: list[str]) -> list[tuple[str, int]]:
    """File and target of each image, sorted; `present` are the classes that the folder has."""
    unknown = [name for name in present if name not in class_names]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} is in {str(folder)!r} but not in train; "
            "add its training images, or take it out of val"
        )
    targets = {name: class_names.index(name) for name in present}
    samples: list[tuple[str, int]] = make_dataset(folder, targets, is_valid_file=_is_image, allow_empty=True)
    filled = {target for _, target in samples}
    empty = [name for name, target in targets.items() if target not in filled]
    if empty:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise ValueError(f"class folder {str(folder / empty[0])!r} has no images ({kinds}); fill it or remove it")
    return samples


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
